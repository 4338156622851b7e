"""Leap multi-token prediction for Hugging Face Transformers (arXiv 2505.17505)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_lmtp import LMTPConfig
from .modeling_lmtp import LMTPForCausalLM

AutoConfig.register("lmtp", LMTPConfig, exist_ok=True)
AutoModel.register(LMTPConfig, LMTPForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(LMTPConfig, LMTPForCausalLM, exist_ok=True)

__version__ = "0.1.0"

__all__ = ["LMTPConfig", "LMTPForCausalLM"]
