"""A causal language model with leap heads: any backbone, untouched, and the heads beside it.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `m` leap heads.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .backbone_lmtp import (
    check_backbone,
    copy_unembedding,
    keep_rows,
    unembedding_inputs,
    unembedding_size,
)
from .checkpoints_lmtp import AUTO_MAP, check_loaded
from .configuration_lmtp import LMTPConfig
from .context_lmtp import context_widths, embed_context, following_tokens
from .generation_lmtp import LMTPGenerationMixin
from .heads_lmtp import LeapHead, ZeroLinear
from .leaps_lmtp import resolve_offsets
from .losses_lmtp import IGNORE_INDEX, leap_losses
from .vocabulary_lmtp import DraftUnembedding


@dataclass
class LMTPCausalLMOutput(CausalLMOutputWithPast):
    """The backbone's causal-LM output (every field of it) and what the leap heads add.

    Args:
        leap_logits: with `output_leap_logits=True`, one `(B, L, V)` tensor per leap head, or
            `(B, L, D)` with a draft vocabulary of `D` tokens: `leap_logits[i][:, s]` predicts the
            token at `s + leap_offsets[i]` (a grounded head sees the token at `s + 1`).
        leap_losses: with `labels`, `(m,)`, each head's mean cross-entropy, detached.
    """

    leap_logits: tuple[torch.Tensor, ...] | None = None
    leap_losses: torch.Tensor | None = None


class LMTPPreTrainedModel(PreTrainedModel):
    """What Transformers needs to know about models with leap heads."""

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
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class LMTPForCausalLM(LMTPPreTrainedModel, LMTPGenerationMixin):
    """A causal language model with leap heads (arXiv 2505.17505).

    Args:
        config: the configuration.
        backbone: a model to use as it is; by default one is built from `config.backbone_config`.

    Raises:
        ValueError: there is no backbone, or it is not a causal language model.
    """

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: LMTPConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            if config.backbone_config is None:
                raise ValueError(
                    "config.backbone_config is not set. Use LMTPForCausalLM.from_backbone(model), or "
                    "pass LMTPConfig(backbone_config=AutoConfig.from_pretrained(backbone))."
                )
            backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        check_backbone(backbone)
        self.backbone = backbone
        self.config.backbone_config = backbone.config
        widths = context_widths(config.leap_offsets, config.head_context)
        self.leap_heads = nn.ModuleList(self._new_head(width) for width in widths)
        self.post_init()
        self._freeze_backbone()
        if not config.share_lm_head:
            for head in self.leap_heads:
                head.lm_head = self._unembedding_copy()

    def _freeze_backbone(self) -> None:
        """Keep optimizers away from the backbone in stage 1."""
        if self.leap_heads and not self.config.train_backbone:
            self.backbone.requires_grad_(False)

    def _new_head(self, context_width: int) -> LeapHead:
        _, hidden_size = unembedding_size(self.backbone)
        embedding_size = self.backbone.get_input_embeddings().weight.shape[1]
        head = LeapHead(
            hidden_size,
            self.config.num_head_layers,
            context_size=context_width * embedding_size,
            lm_head=None if self.config.share_lm_head else self._unembedding_copy(),
        )
        device = self.backbone.get_output_embeddings().weight.device
        return head.to(device=device, dtype=self.backbone.dtype)

    def _unembedding_copy(self) -> nn.Linear:
        return copy_unembedding(self.backbone, self.config.draft_token_ids)

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | Path,
        num_leap_heads: int | None = None,
        leap_stride: int | None = None,
        *,
        leap_offsets: Sequence[int] | None = None,
        head_context: int = 0,
        num_head_layers: int = 1,
        share_lm_head: bool = True,
        draft_token_ids: Sequence[int] | None = None,
        leap_loss_weight: float = 0.1,
        train_backbone: bool = False,
        **backbone_kwargs: Any,
    ) -> "LMTPForCausalLM":
        """Give a causal language model leap heads, which start as the identity.

        Args:
            backbone: a loaded model, used as it is, or an id or folder for AutoModelForCausalLM.
            num_leap_heads: `m`, 3 by default; 0 is plain next-token prediction.
            leap_stride: `k`, 2 by default; the offsets are `1 + k, 1 + 2k, …`; 1 is multi-token
                prediction.
            leap_offsets: the offsets themselves, instead of the two above.
            head_context, num_head_layers, share_lm_head, draft_token_ids, leap_loss_weight,
                train_backbone: see `LMTPConfig`.
            backbone_kwargs: for `AutoModelForCausalLM.from_pretrained`, if `backbone` is an id.

        Raises:
            ValueError: offsets given twice or invalid, or the backbone is not a causal model.
            StrictDataclassError: another value of the configuration is invalid.
        """
        offsets = resolve_offsets(num_leap_heads, leap_stride, leap_offsets)
        if isinstance(backbone, str | Path):
            revision = backbone_kwargs.get("revision")
            backbone = AutoModelForCausalLM.from_pretrained(backbone, **backbone_kwargs)
        elif backbone_kwargs:
            raise ValueError(
                f"{sorted(backbone_kwargs)} are arguments for loading a backbone, but a loaded "
                "model was passed. Drop them, or pass the backbone's id."
            )
        else:
            revision = None
        check_backbone(backbone)
        config = LMTPConfig(
            backbone_config=backbone.config,
            leap_offsets=offsets,
            head_context=head_context,
            num_head_layers=num_head_layers,
            share_lm_head=share_lm_head,
            draft_token_ids=None if draft_token_ids is None else tuple(draft_token_ids),
            leap_loss_weight=leap_loss_weight,
            train_backbone=train_backbone,
            base_model_name_or_path=backbone.config.name_or_path or None,
            base_model_revision=getattr(backbone.config, "_commit_hash", None) or revision,
            dtype=backbone.dtype,
        )
        model = cls(config, backbone=backbone)
        model.generation_config = copy.deepcopy(backbone.generation_config)
        # Otherwise Transformers drops settings that it does not know, ours, on reload
        model.generation_config._from_model_config = False
        return model.train(backbone.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_leap_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **backbone_kwargs: Any,
    ) -> LMTPCausalLMOutput:
        """Run the backbone and, where asked for, the leap heads.

        With `labels`, the loss is `Σ heads` while the backbone is frozen (`train_backbone=False`:
        no logits are computed and no gradient reaches it), else `NTP + β · Σ heads`.

        Args:
            input_ids: `(B, L)`, or `inputs_embeds`: `(B, L, H)`.
            attention_mask: `(B, L)`, 0 at padding.
            position_ids: `(B, L)`.
            labels: `(B, L)`, not shifted, -100 where a token is not a target. If all are, the loss is 0.
            output_leap_logits: also return `(B, L, V)` logits of each leap head.
            num_items_in_batch: what sums of token losses are divided by; by default, for each loss,
                the number of its targets.
            backbone_kwargs: anything else that the backbone's `forward` takes.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **backbone_kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if labels is None:
            outputs, hidden_states = self._run_backbone(inputs)
        elif self.config.train_backbone or not self.leap_heads:
            outputs, hidden_states = self._run_backbone_with_loss(
                inputs, labels, num_items_in_batch
            )
        else:
            outputs, hidden_states = self._run_frozen_backbone(inputs)

        result = LMTPCausalLMOutput()
        for name, value in outputs.items():
            result[name] = value
        if labels is not None and self.leap_heads:
            loss, result["leap_losses"] = self.leap_loss(
                hidden_states, input_ids, labels, num_items_in_batch
            )
            if "loss" in result:
                loss = result["loss"] + self.config.leap_loss_weight * loss
            result["loss"] = loss
        if output_leap_logits:
            result["leap_logits"] = tuple(
                self.leap_logits(head, hidden_states, input_ids)
                for head in range(len(self.leap_heads))
            )
        return result

    def _run_backbone(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        with unembedding_inputs(self.backbone) as states:
            outputs = self.backbone(**inputs, return_dict=True)
        return outputs, states[-1]

    def _run_backbone_with_loss(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[dict[str, Any], torch.Tensor]:
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum()
        # The mean over no targets is 0 / 0 in Transformers' loss; over at least 1 it is 0
        num_items_in_batch = torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
        return self._run_backbone(
            {**inputs, "labels": labels, "num_items_in_batch": num_items_in_batch}
        )

    def _run_frozen_backbone(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        with torch.no_grad(), unembedding_inputs(self.backbone, num_logits=1) as states:
            outputs = self.backbone(**{"use_cache": False, **inputs}, return_dict=True)
        return {name: outputs[name] for name in outputs if name != "logits"}, states[-1]

    def leap_loss(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the heads' losses and each head's mean cross-entropy, detached.

        Args:
            hidden_states: `(B, L, H)`, the backbone's last hidden states.
            input_ids: `(B, L)`; None will do without grounded heads.
            labels: `(B, L)`, not shifted.
            num_items_in_batch: see `forward`.

        Returns:
            A scalar, and `(m,)`.
        """
        totals, counts = leap_losses(self, hidden_states, input_ids, labels)
        means = totals.detach() / counts
        return (totals / (num_items_in_batch or counts)).sum(), means

    @property
    def context_widths(self) -> tuple[int, ...]:
        """How many following tokens each head sees at most, `(m,)`."""
        return context_widths(self.config.leap_offsets, self.config.head_context)

    def draft_unembeddings(self) -> list[Any]:
        """Return, for each head, what maps `(…, H)` to logits of the draft vocabulary `(…, D)`."""
        shared: Any = self.get_output_embeddings()
        if self.config.share_lm_head and self.config.draft_token_ids is not None:
            shared = DraftUnembedding(shared, self.config.draft_token_ids)
        return [head.lm_head or shared for head in self.leap_heads]

    def leap_logits(
        self,
        head: int,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        look_back: int = 0,
    ) -> torch.Tensor:
        """Return one head's logits from every state, as a draft with that look-back would see them.

        Args:
            head: the head's index.
            hidden_states: `(B, L, H)`, the backbone's last hidden states.
            input_ids: `(B, L)`; None will do without grounded heads.
            look_back: a grounded head sees `look_back + 1` following tokens, or fewer.

        Returns:
            `(B, L, V)`, or `(B, L, D)` with a draft vocabulary; `[:, s]` predicts the token at
            `s + leap_offsets[head]`.
        """
        width, context = self.context_widths[head], None
        if width:
            if input_ids is None:
                raise ValueError("Grounded heads (head_context > 0) need input_ids.")
            # Fewer states than tokens, with `logits_to_keep`: the last ones
            tokens, exists = following_tokens(input_ids[:, -hidden_states.shape[1] :], width)
            visible = exists & (torch.arange(width, device=tokens.device) <= look_back)
            context = embed_context(self.get_input_embeddings(), tokens, visible)
        return self.draft_unembeddings()[head](self.leap_heads[head](hidden_states, context))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as Transformers does, and refuse one that is incomplete.

        Raises:
            ValueError: tensors of the checkpoint are missing, or tensors of its leap heads are
                extra or of the wrong shape; the message names them.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # reported below, with all else that is wrong
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        check_loaded(info, pretrained_model_name_or_path)
        model._freeze_backbone()  # loading has made new parameters
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration, generation settings and the code that loads them."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the backbone's unembedding, which the leap heads may share."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the backbone's unembedding."""
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Resize the backbone's vocabulary, and that of heads with an unembedding of their own.

        Rows that such a head did not have start as the backbone's. A draft vocabulary stays as it is.

        Raises:
            ValueError: the new vocabulary would not hold the draft vocabulary.
        """
        draft_ids = self.config.draft_token_ids
        if new_num_tokens is not None and draft_ids is not None and draft_ids[-1] >= new_num_tokens:
            raise ValueError(
                f"draft_token_ids go up to {draft_ids[-1]}, beyond a vocabulary of {new_num_tokens}. "
                "Keep more tokens, or start from a model with another draft vocabulary."
            )
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if not self.config.share_lm_head and draft_ids is None:
            for head in self.leap_heads:
                trained, head.lm_head = head.lm_head, self._unembedding_copy()
                keep_rows(trained, head.lm_head)
        return embeddings
