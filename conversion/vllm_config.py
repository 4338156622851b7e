"""What vLLM can serve of leap heads, and the configuration that it gets to see. Needs no vLLM.

vLLM verifies one chain of candidates per request, and offers a draft model the last state of each.
"""

from typing import Any, NamedTuple

from modeling_lmtp.configuration_lmtp import LAST, LMTPConfig
from modeling_lmtp.heads_only_lmtp import differing_sizes
from modeling_lmtp.leaps_lmtp import context_widths, evenly_spaced_offsets

from .vllm_tickets import ticket_size

DRAFT_ARCHITECTURE = "LMTPDraftModel"
INSTEAD = "Transformers decodes with any heads: model.generate(..., use_lmtp=True)."


class Reason(NamedTuple):
    """Why vLLM cannot draft with leap heads, and with which it could."""

    why: str
    instead: str

    def __str__(self) -> str:
        """Return both as sentences, without the last full stop."""
        return f"{self.why}. {self.instead}"


def reasons_against(config: Any) -> list[Reason]:
    """Say why vLLM cannot draft with the heads of an `LMTPConfig`, and what it can; empty if it can."""
    offsets = config.leap_offsets
    # The record of an adapter describes the heads without their backbone
    hidden_size = getattr(config.get_text_config(), "hidden_size", None)
    adjacent = evenly_spaced_offsets(len(offsets), 1)
    reasons = []
    if not offsets:
        reasons.append(Reason("the checkpoint has no leap heads", "Train some with `lmtp train`"))
    elif offsets != adjacent:
        reasons.append(
            Reason(
                f"leap_offsets={offsets} leave out offsets, so that a draft needs earlier states, "
                "which vLLM does not keep",
                f"Heads for {adjacent} can be served: `lmtp train --leap_offsets "
                f"{' '.join(map(str, adjacent))}`",
            )
        )
    elif hidden_size and hidden_size < ticket_size(
        max(context_widths(offsets, config.head_context))
    ):
        reasons.append(
            Reason(
                f"{len(offsets)} heads with head_context={config.head_context!r} need a hidden size of "
                f"at least {ticket_size(len(offsets))}, the backbone's is {hidden_size}",
                "Fewer heads need less",
            )
        )
    if config.head_input != LAST:
        reasons.append(
            Reason(
                f"head_input={config.head_input!r} reads the states of all layers, of which vLLM passes "
                "on the last",
                f"Heads with head_input={LAST!r} can be served",
            )
        )
    return reasons


def check_servable(config: Any) -> None:
    """Raise a ValueError if vLLM cannot draft with these heads; it gives all reasons."""
    reasons = reasons_against(config)
    if reasons:
        raise ValueError(
            f"vLLM cannot draft with these leap heads: {'; '.join(map(str, reasons))}. {INSTEAD}"
        )


def check_target(config: Any, target: Any, num_speculative_tokens: int) -> None:
    """Raise a ValueError unless heads fit the model that vLLM serves.

    Args:
        config: of the heads.
        target: the text configuration of the model being served.
        num_speculative_tokens: how many tokens vLLM asks them for.
    """
    if num_speculative_tokens > config.num_leap_heads:
        raise ValueError(
            f"num_speculative_tokens={num_speculative_tokens}, but the checkpoint has "
            f"{config.num_leap_heads} leap heads, each for one token. Set it to at most "
            f"{config.num_leap_heads}."
        )
    differing = differing_sizes(config, target)
    if differing:
        raise ValueError(
            f"The leap heads are for another model than the one being served, which has {differing}. Serve "
            f"their backbone, {config.base_model_name_or_path!r}."
        )


class LMTPDraftConfig(LMTPConfig):
    """An `LMTPConfig` in the terms by which vLLM recognises a draft model.

    Args:
        values: see `LMTPConfig`.

    Raises:
        ValueError: vLLM cannot draft with these heads.
    """

    def __post_init__(self, **values: Any) -> None:
        """Check the heads, and name method and draft model: vLLM knows its methods by `model_type`."""
        super().__post_init__(**values)
        if self.backbone_config is None:  # Transformers' way to learn the defaults
            return
        check_servable(self)
        self.model_type = "mtp"
        self.architectures = [DRAFT_ARCHITECTURE]
        # More than one: its second model runner passes the number of the step
        self.num_nextn_predict_layers = self.num_leap_heads
