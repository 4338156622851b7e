"""How a model answers prompts, and how it writes prompts itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DistillSettings:
    """How prompts are answered and, for self-written ones (`magpie_…`), sampled.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    max_new_tokens: int = 320  # a longer answer is cut; its row says `finished: false`
    temperature: float = 0.0  # 0 answers greedily
    top_p: float = 1.0
    num_answers: int = 1  # per prompt; more than one only when sampling
    batch_size: int = 16
    seed: int = 0
    magpie_temperature: float = 1.0
    magpie_top_p: float = 0.95
    magpie_max_tokens: int = 128  # a longer prompt is dropped

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("max_new_tokens", "num_answers", "batch_size", "magpie_max_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("top_p", "magpie_top_p"):
            self._require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        self._require("seed", self.seed >= 0, "0 or more")
        self._require("temperature", self.temperature >= 0, "0 (greedy) or more")
        self._require("magpie_temperature", self.magpie_temperature > 0, "more than 0")
        if self.temperature == 0:
            hint = " with temperature=0 (greedy); raise temperature to sample"
            self._require("num_answers", self.num_answers == 1, "1" + hint)
            self._require("top_p", self.top_p == 1, "1.0" + hint)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {allowed}, got {getattr(self, name)!r}")
