"""How a model answers prompts, and how it writes prompts itself."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from modeling_lmtp.conversion.options import Options, Range


@dataclass(frozen=True)
class DistillSettings(Options):
    """How prompts are answered and, for self-written ones (`magpie_…`), sampled.

    Raises ValueError naming the argument, the value and what is allowed.
    """

    title: ClassVar[str] = "answers"

    max_new_tokens: Annotated[int, Range(ge=1)] = field(
        default=320, metadata={"help": "Cut longer answers; their rows say finished: false."}
    )
    temperature: Annotated[float, Range(ge=0)] = field(
        default=0.0, metadata={"help": "0 decodes greedily."}
    )
    top_p: Annotated[float, Range(gt=0, le=1)] = field(
        default=1.0, metadata={"help": "Sample from the smallest set of tokens this probable."}
    )
    num_answers: Annotated[int, Range(ge=1)] = field(
        default=1, metadata={"help": "Answers per prompt; more than one needs a temperature."}
    )
    batch_size: Annotated[int, Range(ge=1)] = field(
        default=16, metadata={"help": "Answers at a time; with --server, requests at a time."}
    )
    seed: Annotated[int, Range(ge=0)] = field(default=0, metadata={"help": "Seed of the sampling."})
    magpie_temperature: Annotated[float, Range(gt=0)] = field(
        default=1.0, metadata={"help": "Temperature of self-written prompts."}
    )
    magpie_top_p: Annotated[float, Range(gt=0, le=1)] = field(
        default=0.95, metadata={"help": "Top-p of self-written prompts."}
    )
    magpie_max_tokens: Annotated[int, Range(ge=1)] = field(
        default=128, metadata={"help": "Drop self-written prompts that are longer."}
    )

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        if self.temperature == 0 and (self.num_answers > 1 or self.top_p < 1):
            name = "num_answers" if self.num_answers > 1 else "top_p"
            raise ValueError(
                f"{name} must be 1 with temperature=0 (greedy), got {getattr(self, name)!r}; raise "
                "temperature to sample."
            )
