"""What Transformers needs to know of models with leap heads: how weights start, load and are saved."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .checkpoints_lmtp import AUTO_MAP, check_loaded
from .configuration_lmtp import LMTPConfig
from .heads_lmtp import LayerMix
from .transformers_lmtp import start_at_zero
from .zero_lmtp import ZeroLinear


class LMTPPreTrainedModel(PreTrainedModel):
    """A model with a `backbone` and leap heads."""

    config_class = LMTPConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # Answered by the backbone itself when it is built; the wrapper has no attention of its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

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
        """Load a checkpoint as Transformers does, and refuse one that is incomplete.

        Raises:
            ValueError: tensors of the checkpoint are missing, extra or of the wrong shape, or a file
                is corrupt; the message names them.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, with all else that is wrong
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
            ValueError: Transformers does not know the backbone's configuration, so that nothing could load
                the checkpoint; or the folder holds another model, perhaps the backbone itself.
        """
        _check_folder(save_directory, self.config.model_type)
        kind = self.config.backbone_config.model_type
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                f"The backbone is of the kind {kind!r}, which Transformers does not know: its code came "
                "with its repository. A checkpoint could not be loaded again. Register its classes "
                "(AutoConfig.register, AutoModelForCausalLM.register) before saving and loading."
            )
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


def _check_folder(save_directory: str | Path, model_type: str) -> None:
    """Raise a ValueError if saving would overwrite another model."""
    folder = str(save_directory)
    # So that a name cannot be taken for one on the Hub
    folder = folder if folder.startswith(("/", "./", "../", "~")) else f"./{folder}"
    try:
        found, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    except OSError:  # no folder, or none with a configuration
        return
    if found.get("model_type", model_type) != model_type:
        raise ValueError(
            f"{str(save_directory)!r} holds a model of the kind {found['model_type']!r}, and saving there "
            "would destroy it. Choose another folder."
        )
