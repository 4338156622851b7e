"""Merges an adapter into the checkpoint that it was trained on, completely or not at all."""

import re
import warnings

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

HEADS = "leap_heads"  # the name of the module


def fold_in(model: LMTPForCausalLM, source: str) -> LMTPForCausalLM:
    """Merge an adapter into a checkpoint, in place.

    Raises:
        ValueError: the adapter is damaged, was trained on another model, or is not finite.
    """
    try:
        stored = load_peft_weights(source, device="cpu")
        with warnings.catch_warnings():
            # PEFT only warns of missing weights and starts them at zero; they are an error below
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, source)
    except SafetensorError as error:
        raise ValueError(
            f"The adapter {source!r} is damaged ({error}). Download or save it again."
        ) from error
    except (RuntimeError, KeyError) as error:
        raise _does_not_fit(source, str(error)) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    differing = sorted(expected.keys() ^ stored.keys())
    if differing:
        raise _does_not_fit(source, f"{', '.join(differing[:3])} are in one and not in the other")
    # PEFT does not compare the number of heads: an adapter of two heads would load into three
    tuned = {int(match[1]) for name in stored if (match := re.search(rf"{HEADS}\.(\d+)\.", name))}
    if tuned and tuned != set(range(model.config.num_leap_heads)):
        raise _does_not_fit(
            source, f"it tunes heads {sorted(tuned)} of {model.config.num_leap_heads}"
        )
    merged: LMTPForCausalLM = adapted.merge_and_unload(safe_merge=True)
    return merged


def _does_not_fit(source: str, reason: str) -> ValueError:
    return ValueError(
        f"The adapter {source!r} does not fit the checkpoint: {reason}. Pass the checkpoint that the "
        "adapter was trained on with --base."
    )
