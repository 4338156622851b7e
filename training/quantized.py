"""Loading a checkpoint with a quantized backbone, to tune adapters on it (QLoRA).

Tried with bitsandbytes 0.50.2 on the CPU, on tiny models. In 8 bits adapters train; LLM.int8 lets the
tokens of one pass change each other's logits, so in float32 L-MTP refuses to decode, and in 16 bits its
text may part from plain decoding's more often. In 4 bits L-MTP decodes, and training is refused on a CPU
(see `check_trainable`). Not tried: any GPU.
"""

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import is_bitsandbytes_available

from modeling_lmtp.conversion.loading import load_lmtp
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM

BITS = (4, 8)


def load_quantized(source: str, bits: int, dtype: str = "auto") -> LMTPForCausalLM:
    """Load a checkpoint and quantize its backbone's linear layers; unembedding and heads stay whole.

    Args:
        source: folder or Hub id.
        bits: 4 (NF4) or 8 (LLM.int8).
        dtype: of all that is not quantized, and of the arithmetic.

    Raises:
        ValueError: `bits` is neither, bitsandbytes is missing, or the checkpoint has no leap heads.
        RuntimeError: bitsandbytes supports none of the devices here.
    """
    if bits not in BITS:
        raise ValueError(
            f"bits must be 4 or 8, got {bits}. Leave it out to load the backbone whole."
        )
    if not is_bitsandbytes_available():
        raise ValueError(
            f"bits={bits} needs bitsandbytes, which is missing or too old. "
            "`pip install -U bitsandbytes`, or leave bits out to load the backbone whole."
        )
    validate_bnb_backend_availability(raise_exception=True)
    return load_lmtp(source, dtype, quantization_config=_quantization(source, bits, dtype))


def _quantization(source: str, bits: int, dtype: str) -> BitsAndBytesConfig:
    config = AutoConfig.from_pretrained(source)
    compute_dtype = config.dtype if dtype == "auto" else getattr(torch, dtype, None)
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype or torch.float32,
        llm_int8_skip_modules=_whole_modules(config) if config.model_type == "lmtp" else None,
    )


def _whole_modules(config: AutoConfig) -> list[str]:
    """Return the names of what is not quantized, found in a model without weights."""
    with torch.device("meta"):
        model = LMTPForCausalLM(config)
    unembedding = model.get_output_embeddings()
    return ["leap_heads", *(name for name, part in model.named_modules() if part is unembedding)]
