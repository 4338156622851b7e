"""Configuration of a causal language model with leap heads."""

# First, because it raises a clear error if Transformers is too old. Loaders of old releases find only
# files that this file, or a file that it imports, imports. So the files imported here import each other
# only.
from .transformers_lmtp import (  # isort: split
    CACHE_NAMES,
    implementations,
    remove_local_path,
    set_implementations,
)

from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .leaps_lmtp import PATH, check_offsets

LAST, WEIGHTED = HEAD_INPUTS = "last", "weighted"  # the values of `head_input`
# What libraries ask a model's configuration, and the backbone's answers. Not all of its attributes, because
# Transformers takes some (rope_parameters, layer_types, …) as this configuration's own to check and convert
BACKBONE_ATTRIBUTES = (
    "vocab_size",
    "tie_word_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "quantization_config",
)


@strict
class LMTPConfig(PreTrainedConfig):
    """Configuration of `LMTPForCausalLM`: a backbone and its leap heads (arXiv 2505.17505).

    Settings of decoding alone (`use_lmtp`, `draft_tree`, `draft_length`, …) are in `generation_config`.
    `BACKBONE_ATTRIBUTES` are read from, and set in, the backbone's configuration.

    Args:
        backbone_config: configuration, or its dict, of any causal language model.
        leap_offsets: increasing integers ≥ 2; leap head `i` predicts `x_{s + leap_offsets[i]}` from
            the hidden state at `s`. The paper's default, leap 2 with 3 heads, is `(3, 5, 7)`.
            Empty: no leap heads, plain next-token prediction.
        head_context: how many known tokens after its state a head may see (*grounded* heads); 0 is the
            paper's head. With `"path"`, a head sees all tokens up to its target, including those drafted
            before it on the same path (*path-grounded* heads).
        head_input: which states a head reads: `"last"`, the unembedding's input, or `"weighted"`, also a
            learned mean of all layers' states (arXiv 2502.09419).
        num_head_layers: residual blocks per leap head.
        share_lm_head: leap heads share the backbone's unembedding. `False` gives each head its own matrix,
            as in the paper, which starts as a copy of the backbone's.
        lm_head_rank: the rank of each head's update of the shared unembedding, `B A` in `W + B A`, which
            starts at zero; 0 for no update.
        draft_token_ids: the tokens that heads may propose, increasing; None for the whole vocabulary.
        leap_loss_weight: β, the weight of the heads' losses relative to the backbone's (stage 2).
        train_backbone: whether the backbone trains. `False` (stage 1) freezes it, and only the heads have a
            loss.
        base_model_name_or_path: the Hub id or folder of the backbone.
        base_model_revision: its commit, if known.
        heads_only: the checkpoint contains the leap heads only; loading it gets the backbone's weights from
            `base_model_name_or_path`.
    """

    model_type = "lmtp"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (read by Transformers as it is)
    _auto_class = "AutoConfig"
    # Outputs that `Trainer.predict` must not treat as predictions
    keys_to_ignore_at_inference = [*CACHE_NAMES, "leap_losses"]  # noqa: RUF012 (as Transformers has it)

    backbone_config: Any = None  # PreTrainedConfig; a dict is turned into one
    leap_offsets: list[int] | tuple[int, ...] = (3, 5, 7)
    head_context: int | str = 0
    head_input: str = "last"
    num_head_layers: int = 1
    share_lm_head: bool = True
    lm_head_rank: int = 0
    draft_token_ids: list[int] | tuple[int, ...] | None = None
    leap_loss_weight: float | int = 0.1
    train_backbone: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    heads_only: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the backbone's configuration from its dict, and normalise types."""
        if isinstance(self.backbone_config, dict):
            if "model_type" not in self.backbone_config:
                raise ValueError(
                    "backbone_config has no 'model_type', so its architecture is unknown. Pass the "
                    "backbone's own configuration, e.g. AutoConfig.from_pretrained(backbone)."
                )
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        self.leap_offsets = tuple(self.leap_offsets)
        if self.draft_token_ids is not None:
            self.draft_token_ids = tuple(self.draft_token_ids)
        before = implementations(self.backbone_config)
        super().__post_init__(**kwargs)
        if self.backbone_config is not None and kwargs.get("attn_implementation") is None:
            # Transformers has passed the unset implementation down to the backbone's configuration, which
            # may be that of a loaded model
            set_implementations(self.backbone_config, before)

    def _backbone_config_with(self, name: str) -> Any:
        """Return the backbone's configuration, or its text configuration, that has a name; or None."""
        backbone = vars(self).get("backbone_config")
        if name not in BACKBONE_ATTRIBUTES or not isinstance(backbone, PreTrainedConfig):
            return None
        configs = backbone, backbone.get_text_config()
        return next((config for config in configs if hasattr(config, name)), None)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that the backbone's configuration answers."""
        config = self._backbone_config_with(name)
        if config is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute here, or where `__getattr__` reads it."""
        config = None if name in vars(self) else self._backbone_config_with(name)
        if config is None:
            super().__setattr__(name, value)
        else:
            setattr(config, name, value)

    def validate_leap_offsets(self) -> None:
        """Offsets are increasing integers of at least 2."""
        check_offsets(self.leap_offsets)

    def validate_head_context(self) -> None:
        """The number of visible tokens is not negative."""
        is_path = self.head_context == PATH
        if not is_path and (isinstance(self.head_context, str) or self.head_context < 0):
            raise ValueError(
                "head_context must be 0 (the paper's head) or more, or 'path', got "
                f"{self.head_context!r}."
            )

    def validate_head_input(self) -> None:
        """A head reads the last state, or the states of all layers."""
        if self.head_input not in HEAD_INPUTS:
            raise ValueError(
                f"head_input must be 'last' (the paper's head) or 'weighted', got {self.head_input!r}."
            )

    def validate_draft_token_ids(self) -> None:
        """The draft vocabulary is increasing, not empty, and part of the backbone's."""
        ids = self.draft_token_ids
        if ids is None:
            return
        if not ids or ids[0] < 0 or any(b <= a for a, b in pairwise(ids)):
            raise ValueError(
                "draft_token_ids must be increasing token ids, at least one, or None for all tokens; got "
                f"{len(ids)} ids that begin with {list(ids[:5])}."
            )
        if self.backbone_config is not None and ids[-1] >= self.get_text_config().vocab_size:
            raise ValueError(
                f"draft_token_ids go up to {ids[-1]}, but the backbone's vocabulary has "
                f"{self.get_text_config().vocab_size} tokens."
            )

    def validate_num_head_layers(self) -> None:
        """A leap head has at least one block."""
        if self.num_head_layers < 1:
            raise ValueError(f"num_head_layers must be 1 or more, got {self.num_head_layers}.")

    def validate_lm_head_rank(self) -> None:
        """A low-rank update needs a shared unembedding to update."""
        if self.lm_head_rank < 0:
            raise ValueError(
                f"lm_head_rank must be 0 (no low-rank update) or more, got {self.lm_head_rank}."
            )
        if self.lm_head_rank and not self.share_lm_head:
            raise ValueError(
                f"lm_head_rank={self.lm_head_rank} adapts the shared unembedding, but with "
                "share_lm_head=False each head has its own. Set one or the other."
            )

    def validate_leap_loss_weight(self) -> None:
        """β is not negative."""
        if not self.leap_loss_weight >= 0:
            raise ValueError(f"leap_loss_weight must be 0 or more, got {self.leap_loss_weight}.")

    def validate_backbone_config(self) -> None:
        """The backbone is a decoder-only model."""
        if self.backbone_config is not None and self.backbone_config.is_encoder_decoder:
            raise ValueError(
                f"The backbone is an encoder-decoder model ({self.backbone_config.model_type!r}). "
                "Leap heads need a causal language model, as AutoModelForCausalLM loads it."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all values, without the local path of the backbone."""
        values = super().to_dict()
        if isinstance(values.get("backbone_config"), dict):
            remove_local_path(values["backbone_config"])
        # PEFT reads it from the dict
        return {"tie_word_embeddings": getattr(self, "tie_word_embeddings", False), **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is saved; the backbone's attributes are saved once, in `backbone_config`."""
        values, own = super().to_diff_dict(), vars(self)
        return {n: v for n, v in values.items() if n in own or n not in BACKBONE_ATTRIBUTES}

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the backbone's text configuration, which describes vocabulary, layers and cache."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def num_leap_heads(self) -> int:
        """The number of leap heads, without the language-modeling head."""
        return len(self.leap_offsets)
