"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from .vllm_config import DRAFT_ARCHITECTURE, LMTPDraftConfig

DRAFT_MODEL = f"{__package__}.vllm_draft_model:{DRAFT_ARCHITECTURE}"


def register() -> None:
    """Tell vLLM how to draft with leap heads; calling it again changes nothing.

    In a process of vLLM, AutoConfig then gives vLLM's view of a checkpoint with leap heads. Load one there
    with `LMTPForCausalLM`, not with the Auto classes.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    AutoConfig.register("lmtp", LMTPDraftConfig, exist_ok=True)
    # By name, so that the model is imported where it is used and nowhere else
    ModelRegistry.register_model(DRAFT_ARCHITECTURE, DRAFT_MODEL)
