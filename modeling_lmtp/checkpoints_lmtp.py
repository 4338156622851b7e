"""What a checkpoint with leap heads names and must hold."""

from pathlib import Path
from typing import Any

# Which shipped class serves which Auto class, for `trust_remote_code=True`
AUTO_MAP = {
    "AutoConfig": "configuration_lmtp.LMTPConfig",
    "AutoModel": "modeling_lmtp.LMTPForCausalLM",
    "AutoModelForCausalLM": "modeling_lmtp.LMTPForCausalLM",
}


# By which the Hub's search finds checkpoints
TAGS = ("l-mtp", "multi-token-prediction", "speculative-decoding")


def check_loaded(loading_info: dict[str, Any], source: str | Path | None) -> None:
    """Refuse a checkpoint from which Transformers had to make up or leave out tensors.

    Transformers fills missing tensors with fresh ones and only warns; leap heads loaded like that
    would be accepted nowhere, in silence.

    Args:
        loading_info: what `from_pretrained(..., output_loading_info=True)` returned.
        source: the checkpoint, for the message.

    Raises:
        ValueError: names the tensors and what is wrong with them.
    """
    problems = {
        "missing": sorted(loading_info["missing_keys"]),
        "not part of the model that the configuration describes": sorted(
            loading_info["unexpected_keys"]
        ),
        "of another shape than the configuration says": sorted(
            str(key) for key in loading_info["mismatched_keys"]
        ),
    }
    found = [f"{', '.join(keys)}: {what}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"The checkpoint {str(source)!r} does not hold the model of its configuration. "
            + "; ".join(found)
            + ". Save it again from a complete model, or correct backbone_config, leap_offsets, "
            "num_head_layers and share_lm_head in its config.json."
        )
