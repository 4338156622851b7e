"""How models with leap heads initialise, load and save their weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .configuration_lmtp import LMTPConfig
from .heads_lmtp import LayerMix
from .transformers_lmtp import start_at_zero
from .unembeddings_lmtp import ZeroLinear

# Which shipped class serves which Auto class, for `trust_remote_code=True`
AUTO_MAP = {
    "AutoConfig": "configuration_lmtp.LMTPConfig",
    "AutoModel": "modeling_lmtp.LMTPForCausalLM",
    "AutoModelForCausalLM": "modeling_lmtp.LMTPForCausalLM",
}

# For the Hub's search
TAGS = ("l-mtp", "multi-token-prediction", "speculative-decoding")


class LMTPPreTrainedModel(PreTrainedModel):
    """A model with a `backbone` and leap heads."""

    config_class = LMTPConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # The backbone checks these itself when it is built; the wrapper has no attention
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # None of its own; PEFT looks for the backbone's only if this is a dict
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 (read by Transformers as it is)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            start_at_zero(module.weight)
            if module.bias is not None:
                start_at_zero(module.bias)
        elif isinstance(module, LayerMix):
            start_at_zero(module.weights)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as Transformers does, but refuse one that is incomplete.

        Raises:
            ValueError: tensors of the checkpoint are missing, extra or of the wrong shape, or a file
                is corrupt; the message names them.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # `check_loaded` reports them with everything else
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {str(pretrained_model_name_or_path)!r} cannot be read: {error}. A "
                "file is truncated or corrupt: fetch or save the checkpoint again."
            ) from error
        check_loaded(info, pretrained_model_name_or_path)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration, generation settings and the code that loads them.

        Raises:
            ValueError: Transformers does not know the backbone's architecture, so the checkpoint could
                not be loaded; the backbone is quantized apart from the heads; or the folder holds another
                model, perhaps the backbone.
        """
        _check_folder(save_directory, self.config.model_type)
        kind = self.config.backbone_config.model_type
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                f"Transformers does not know the backbone's architecture {kind!r}: its code came with its "
                "repository, so the checkpoint could not be loaded. Register its classes "
                "(AutoConfig.register, AutoModelForCausalLM.register) before saving and loading."
            )
        if not self.config.heads_only:
            check_quantization(self.config.backbone_config)
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


def check_quantization(backbone_config: Any) -> None:
    """Raise a ValueError if a backbone is quantized, so that it cannot be saved together with its heads.

    Loading would take the heads for quantized too. (A checkpoint that was quantized as a whole says so in
    its own configuration, not in the backbone's.)
    """
    if getattr(backbone_config, "quantization_config", None) is not None:
        raise ValueError(
            "The backbone is quantized, and a checkpoint of it and the heads could not be loaded. Save the "
            "heads only (heads_only=True), or add them to the unquantized backbone and quantize in "
            "LMTPForCausalLM.from_pretrained(..., quantization_config=...)."
        )


def _check_folder(save_directory: str | Path, model_type: str) -> None:
    """Raise a ValueError if saving would overwrite another model."""
    folder = str(save_directory)
    # A bare name would be looked up on the Hub
    folder = folder if folder.startswith(("/", "./", "../", "~")) else f"./{folder}"
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    except OSError:  # no folder, or none with a configuration
        return
    if config.get("model_type", model_type) != model_type:
        raise ValueError(
            f"{str(save_directory)!r} holds a model of the kind {config['model_type']!r}, and saving there "
            "would destroy it. Choose another folder."
        )


def check_loaded(loading_info: dict[str, Any], source: str | Path | None) -> None:
    """Refuse a checkpoint with missing or unexpected tensors.

    Transformers initialises missing tensors and only warns. Drafts of leap heads loaded like that would
    simply never be accepted.

    Args:
        loading_info: what `from_pretrained(..., output_loading_info=True)` returned.
        source: the checkpoint, for the message.

    Raises:
        ValueError: names the tensors and what is wrong with them.
    """
    problems = {
        "missing": sorted(loading_info["missing_keys"]),
        "not part of the configured model": sorted(loading_info["unexpected_keys"]),
        "of another shape than configured": sorted(
            str(key) for key in loading_info["mismatched_keys"]
        ),
    }
    messages = [f"{', '.join(keys)}: {what}" for what, keys in problems.items() if keys]
    if messages:
        raise ValueError(
            f"The checkpoint {str(source)!r} does not match its configuration: "
            + "; ".join(messages)
            + ". Save it again from a complete model, or correct backbone_config, leap_offsets, "
            "num_head_layers and share_lm_head in its config.json."
        )
