"""Heads-only checkpoints: the leap heads in one repository, their backbone in another."""

import copy
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .backbone_lmtp import unembedding_device
from .heads_lmtp import new_leap_heads
from .pretrained_lmtp import LMTPPreTrainedModel
from .transformers_lmtp import AUTO_OPTIONS, attention_implementation, commit_of

logger = logging.get_logger(__name__)

HEADS = "leap_heads."
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
HEADS_OPTIONS = ("revision", "subfolder", "variant")  # say where the heads are in their repository
# Not for the backbone; trusting the code of one repository does not mean trusting that of another
HEADS_ONLY_OPTIONS = (
    *HEADS_OPTIONS,
    "generation_config",
    "trust_remote_code",
    *AUTO_OPTIONS,
)
SAME_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")


class LeapHeadsAlone(LMTPPreTrainedModel):
    """The leap heads alone, so that Transformers can load them for a backbone that is already loaded.

    Args:
        config: the configuration of the whole model.
        backbone: the heads' backbone, which does not become a part of this model.
    """

    def __init__(self, config: Any, backbone: PreTrainedModel) -> None:
        super().__init__(config)
        self.leap_heads = new_leap_heads(config, backbone)
        if not config.share_lm_head:
            self.leap_heads.start_unembeddings(backbone, config.draft_token_ids)
        self.post_init()


class HeadsOnlyMixin(LMTPPreTrainedModel):
    """Loads and saves checkpoints with or without the backbone's weights."""

    def _freeze_backbone(self) -> None:
        """Freeze the backbone in stage 1, so that optimizers leave it alone."""
        if self.config.num_leap_heads and not self.config.train_backbone:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; a frozen backbone stays in evaluation mode, since decoding sees no dropout."""
        super().train(mode)
        if self.config.num_leap_heads and not self.config.train_backbone:
            self.backbone.eval()
        return self

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        backbone: PreTrainedModel | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint as Transformers does; for a heads-only one, load the backbone as well.

        Args:
            pretrained_model_name_or_path: a folder or Hub id.
            args, kwargs: see `PreTrainedModel.from_pretrained`. For a heads-only checkpoint, those that
                do not locate the heads are passed on to the backbone.
            backbone: replaces the backbone that a heads-only checkpoint names: a loaded model, which is
                used unmodified, or an id or folder. (AutoModelForCausalLM copies a loaded model before it
                gets here; this class does not.)

        Raises:
            ValueError: tensors are missing, unexpected or of the wrong shape; the backbone's sizes do not
                fit the heads; or `backbone` is passed for a checkpoint that has one.
        """
        source = pretrained_model_name_or_path
        if not _is_heads_only(cls, source, kwargs):
            if backbone is not None:
                raise ValueError(
                    f"backbone was passed, but {str(source)!r} contains a backbone. Leave out the "
                    "argument, or load a heads-only checkpoint."
                )
            loaded = super().from_pretrained(source, *args, **kwargs)
            (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_backbone()
            return loaded
        with_info = kwargs.pop("output_loading_info", False)
        config, options = _config_and_options(cls, source, kwargs)
        model = _load_backbone(config, backbone, options)
        location = {name: kwargs[name] for name in (*HUB_OPTIONS, *HEADS_OPTIONS) if name in kwargs}
        heads, info = LeapHeadsAlone.from_pretrained(
            source,
            config=_unquantized(config),
            backbone=model,
            dtype=model.dtype,
            output_loading_info=True,
            **location,
        )
        joined = _join(cls, heads, model)
        joined.generation_config = _generation_config(source, model, kwargs, location)
        return (joined, info) if with_info else joined

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, heads_only: bool = False, **kwargs: Any
    ) -> None:
        """Save weights, configuration, generation settings and the code that loads them.

        Args:
            save_directory, args, kwargs: see `PreTrainedModel.save_pretrained`.
            heads_only: leave out the backbone's weights. Loading the checkpoint gets them from
                `config.base_model_name_or_path` at `config.base_model_revision`, so the backbone must be
                unchanged from there.

        Raises:
            ValueError: `heads_only=True`, and the configuration does not name the backbone, or names one of
                other sizes.
        """
        if not heads_only:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        check_named_backbone(self.config)
        tensors = kwargs.pop("state_dict", None) or self.state_dict()
        kwargs["state_dict"] = {key: t for key, t in tensors.items() if key.startswith(HEADS)}
        self.config.heads_only = True
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.heads_only = False


def _is_heads_only(cls: Any, source: str | Path | None, kwargs: dict[str, Any]) -> bool:
    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return kwargs["config"].heads_only
    names = (*HUB_OPTIONS, *HEADS_OPTIONS)
    location = {name: kwargs[name] for name in names if name in kwargs}
    try:
        config, _ = cls.config_class.get_config_dict(kwargs.get("config") or source, **location)
    except (
        OSError
    ):  # an adapter, which Transformers loads with its base model, or an error that it reports
        return False
    return config.get("heads_only", False)


def _config_and_options(
    cls: Any, source: str | Path | None, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the configuration, and the arguments for loading the backbone."""
    config = kwargs.pop("config", None)
    dtype = kwargs.pop("dtype", "auto")
    options = kwargs
    if not isinstance(config, PreTrainedConfig):
        config, options = cls.config_class.from_pretrained(
            config or source, return_unused_kwargs=True, **kwargs
        )
    options = {name: value for name, value in options.items() if name not in HEADS_ONLY_OPTIONS}
    options |= {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    options["dtype"] = config.dtype if dtype in ("auto", None) else dtype  # as Transformers does
    if attention_implementation(config.backbone_config) is not None:
        options["attn_implementation"] = attention_implementation(config.backbone_config)
    return config, backbone_options(options)


def _quantization(config: Any, revision: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return how the backbone was quantized when it was loaded; empty if not, or if it was saved so."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return {}
    location = {name: options[name] for name in HUB_OPTIONS if name in options}
    named = AutoConfig.from_pretrained(
        config.base_model_name_or_path, revision=revision, **location
    )
    return {} if hasattr(named, "quantization_config") else {"quantization_config": how}


def _unquantized(config: Any) -> Any:
    """Return a copy of an `LMTPConfig` by which Transformers does not take the heads for quantized."""
    config = copy.deepcopy(config)
    for part in (config.backbone_config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def backbone_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for loading the backbone alone, with the attention that was given to it by name."""
    attention = options.get("attn_implementation")
    if not isinstance(attention, dict) or "backbone_config" not in attention:
        return options
    return {**options, "attn_implementation": attention["backbone_config"]}


def _load_backbone(
    config: Any, backbone: PreTrainedModel | str | Path | None, options: dict[str, Any]
) -> Any:
    named, revision = config.base_model_name_or_path, config.base_model_revision
    loaded_from: str | None = "main"
    if isinstance(backbone, PreTrainedModel):
        model, loaded_from = backbone, None
    elif backbone is not None:
        model = AutoModelForCausalLM.from_pretrained(backbone, **options)
    else:
        if not named:
            raise ValueError(
                "The checkpoint contains leap heads only, and does not name their backbone. Pass "
                "backbone=, a model, id or folder."
            )
        where = f", revision {revision}" if revision else ""
        logger.warning_once(
            f"The checkpoint contains leap heads only; loading their backbone {named!r}{where}."
        )
        loaded_from = revision or "main"
        options = {**_quantization(config, loaded_from, options), **options}
        model = AutoModelForCausalLM.from_pretrained(named, revision=loaded_from, **options)
        config.base_model_revision = commit_of(model.config, loaded_from) or revision
        if config.base_model_revision and not revision:
            logger.warning_once(
                f"The checkpoint pins no commit of {named!r}; loaded {config.base_model_revision} of its "
                "main branch, which may change. Pin it: `lmtp publish --form heads --base_revision COMMIT`."
            )
    differing = differing_sizes(config, model.config)
    if differing:
        raise ValueError(
            f"The leap heads do not fit the backbone {model.config.name_or_path!r}, which has {differing}. "
            f"Pass backbone={named!r}, or leave the argument out."
        )
    commit = commit_of(model.config, loaded_from)
    if revision and commit and commit != revision:
        logger.warning_once(
            f"The leap heads are for revision {revision} of {named!r}, but the backbone is revision "
            f"{commit} of {model.config.name_or_path!r}. Their drafts may be accepted less often."
        )
    return model


def differing_sizes(config: Any, other: Any) -> str:
    """Say in which sizes a model differs from the one that an `LMTPConfig`'s heads need; empty if in none.

    Args:
        config: of the heads.
        other: of the model.
    """
    expected, actual = config.get_text_config(), other.get_text_config()
    sizes = [(n, getattr(actual, n, None), getattr(expected, n, None)) for n in SAME_SIZES]
    return ", ".join(
        f"{name} {ours} instead of {heads}" for name, ours, heads in sizes if ours != heads
    )


def check_named_backbone(config: Any) -> None:
    """Raise a ValueError unless heads-only checkpoints find the backbone that an `LMTPConfig` names.

    Its sizes are compared if its configuration is a local file, perhaps in the Hub cache.
    """
    name, revision = config.base_model_name_or_path, config.base_model_revision
    if not name:
        raise ValueError(
            "config.base_model_name_or_path is not set, so a heads-only checkpoint could not be "
            "loaded. Set it to the backbone's Hub id or folder, and base_model_revision to its "
            "commit, or save with heads_only=False."
        )
    try:
        named = AutoConfig.from_pretrained(
            name, revision=revision or "main", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):  # not here; loading compares the sizes again
        return
    differing = differing_sizes(named, config)
    if differing:
        raise ValueError(
            f"The backbone has {differing} at {name!r}, such as after resize_token_embeddings, so a "
            "heads-only checkpoint could not be loaded. Save with heads_only=False; or save the backbone "
            "too (model.backbone.save_pretrained), and set config.base_model_name_or_path to its place."
        )


def _join(cls: Any, heads: LeapHeadsAlone, backbone: PreTrainedModel) -> Any:
    heads.config.heads_only = False
    model = cls(heads.config, backbone=backbone)
    model.leap_heads = heads.leap_heads.to(unembedding_device(backbone))
    return model.eval()


def _generation_config(
    source: str | Path | None, backbone: Any, kwargs: dict[str, Any], location: dict[str, Any]
) -> GenerationConfig:
    if kwargs.get("generation_config") is not None:
        return kwargs["generation_config"]
    try:
        return GenerationConfig.from_pretrained(source, **location)
    except OSError:  # the repository of the heads has none
        return backbone.generation_config
