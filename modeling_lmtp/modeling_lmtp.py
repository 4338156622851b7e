"""A causal language model with leap heads: an unmodified backbone, and the heads beside it.

Shapes: `B` batch, `L` length, `H` hidden size, `V` vocabulary size, `m` leap heads.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput, logging

from .backbone_lmtp import check_backbone, unembedding_size
from .configuration_lmtp import LMTPConfig
from .generation_lmtp import LMTPGenerationMixin
from .heads_lmtp import new_leap_heads
from .heads_only_lmtp import HeadsOnlyMixin, backbone_options
from .leaps_lmtp import (
    context_widths,
    embed_context,
    following_tokens,
    num_visible,
    resolve_offsets,
)
from .losses_lmtp import IGNORE_INDEX, LeapObjective, check_labels, leap_losses, warn_without_labels
from .pretrained_lmtp import TAGS
from .states_lmtp import head_states, run_pass
from .transformers_lmtp import commit_of, keep_custom_settings
from .unembeddings_lmtp import HeadUnembedding, logit_scale, shared_unembedding

logger = logging.get_logger(__name__)


@dataclass
class LMTPCausalLMOutput(CausalLMOutputWithPast):
    """The backbone's causal-LM output with all its fields, and those of the leap heads.

    Args:
        leap_logits: with `output_leap_logits=True`, one `(B, L, V)` tensor per leap head, or
            `(B, L, D)` with a draft vocabulary of `D` tokens: `leap_logits[i][:, s]` predicts the
            token at `s + leap_offsets[i]` (a grounded head sees the token at `s + 1`).
        leap_losses: with `labels`, each head's mean cross-entropy, `(m,)`, detached.
    """

    leap_logits: tuple[torch.Tensor, ...] | None = None
    leap_losses: torch.Tensor | None = None


class LMTPForCausalLM(HeadsOnlyMixin, LMTPGenerationMixin):
    """A causal language model with leap heads (arXiv 2505.17505).

    Args:
        config: the configuration.
        backbone: a model to use unmodified; by default, one is built from `config.backbone_config`.

    Raises:
        ValueError: there is no backbone, or it is no causal language model.
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
        self.leap_heads = new_leap_heads(config, backbone)
        self.post_init()
        self.add_model_tags(list(TAGS))
        self._freeze_backbone()
        if not config.share_lm_head:
            self.leap_heads.start_unembeddings(backbone, config.draft_token_ids)

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | Path,
        num_leap_heads: int | None = None,
        leap_stride: int | None = None,
        *,
        leap_offsets: Sequence[int] | None = None,
        head_context: int | str = 0,
        head_input: str = "last",
        num_head_layers: int = 1,
        share_lm_head: bool = True,
        lm_head_rank: int = 0,
        draft_token_ids: Sequence[int] | None = None,
        leap_loss_weight: float = 0.1,
        train_backbone: bool = False,
        **backbone_kwargs: Any,
    ) -> "LMTPForCausalLM":
        """Add leap heads, which start as the identity, to a causal language model.

        Args:
            backbone: a loaded model, which is used unmodified, or an id or folder for AutoModelForCausalLM.
            num_leap_heads: `m`, 3 by default; 0 is plain next-token prediction.
            leap_stride: `k`, 2 by default; the offsets are `1 + k, 1 + 2k, …`; 1 is multi-token
                prediction.
            leap_offsets: the offsets, instead of the two above.
            head_context, head_input, num_head_layers, share_lm_head, lm_head_rank, draft_token_ids,
                leap_loss_weight, train_backbone: see `LMTPConfig`.
            backbone_kwargs: for `AutoModelForCausalLM.from_pretrained`, if `backbone` is an id.

        Raises:
            ValueError: the offsets are invalid or given in both ways, or the backbone is no causal model.
            StrictDataclassError: another value of the configuration is invalid.
        """
        offsets = resolve_offsets(num_leap_heads, leap_stride, leap_offsets)
        loaded_from = None
        if isinstance(backbone, str | Path):
            revision = backbone_kwargs.get("revision")
            loaded_from = revision or "main"
            options = backbone_options(backbone_kwargs)
            backbone = AutoModelForCausalLM.from_pretrained(backbone, **options)
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
            head_input=head_input,
            num_head_layers=num_head_layers,
            share_lm_head=share_lm_head,
            lm_head_rank=lm_head_rank,
            draft_token_ids=None if draft_token_ids is None else tuple(draft_token_ids),
            leap_loss_weight=leap_loss_weight,
            train_backbone=train_backbone,
            base_model_name_or_path=backbone.config.name_or_path or None,
            base_model_revision=commit_of(backbone.config, loaded_from) or revision,
            dtype=backbone.dtype,
        )
        model = cls(config, backbone=backbone)
        model.generation_config = copy.deepcopy(backbone.generation_config)
        keep_custom_settings(model.generation_config)
        return model.train(backbone.training)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_leap_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        leap_objective: LeapObjective = leap_losses,
        known_states: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **backbone_kwargs: Any,
    ) -> LMTPCausalLMOutput | tuple[Any, ...]:
        """Run the backbone and, if requested, the leap heads.

        With `labels`, the loss is `NTP + β · Σ heads`; or `Σ heads` if the backbone is frozen
        (`train_backbone=False`), which then computes no logits and gets no gradient.

        Args:
            input_ids: `(B, L)`, or `inputs_embeds`: `(B, L, H)`.
            attention_mask: `(B, L)`, 0 at padding.
            position_ids: `(B, L)`; in a packed sequence they restart with each part.
            labels: `(B, L)`, not shifted, -100 for tokens to ignore. If all are ignored, the loss is 0.
            output_leap_logits: also return the logits `(B, L, V)` of each leap head.
            num_items_in_batch: the divisor of the summed token losses; by default, the number of targets of
                each loss.
            leap_objective: the heads' loss, in place of `leap_losses`.
            known_states: the heads' input for these tokens, `(B, L, H)`, if it has been computed before
                (see `head_states`). With `labels` and a frozen backbone, the backbone does not run then.
            return_dict: `False` returns a tuple; `config.return_dict` by default.
            backbone_kwargs: other arguments of the backbone's `forward`.

        Raises:
            ValueError: a label is no token id, or grounded heads get no `input_ids`.
        """
        if labels is not None:
            check_labels(labels, unembedding_size(self.backbone)[0])
        elif self.training and not output_leap_logits:
            warn_without_labels(self.leap_heads)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **backbone_kwargs,
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        result = LMTPCausalLMOutput()
        if labels is not None and known_states is not None and self._backbone_is_frozen:
            hidden_states = known_states
        else:
            outputs, hidden_states = self._run_backbone(inputs, labels, num_items_in_batch)
            for name, value in outputs.items():
                result[name] = value
        if labels is not None and self.config.num_leap_heads:
            loss, result["leap_losses"] = leap_objective(
                self, hidden_states, input_ids, labels, position_ids, num_items_in_batch
            )
            if "loss" in result:
                loss = result["loss"] + self.config.leap_loss_weight * loss
            result["loss"] = loss
        if output_leap_logits:
            result["leap_logits"] = tuple(
                self.leap_logits(head, hidden_states, input_ids)
                for head in range(self.config.num_leap_heads)
            )
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return result if returns_dict else result.to_tuple()

    @property
    def _backbone_is_frozen(self) -> bool:
        """Whether only the heads have a loss, in stage 1."""
        return not self.config.train_backbone and self.config.num_leap_heads > 0

    def _run_backbone(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the backbone's output fields, with its loss if it trains, and the heads' input."""
        if labels is None:
            return self.run_pass(inputs)
        if not self._backbone_is_frozen:
            if num_items_in_batch is None:
                num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum()
            # At least 1, because Transformers' mean over no targets would be 0 / 0
            divisor = torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
            return self.run_pass({**inputs, "labels": labels, "num_items_in_batch": divisor})
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters()):
            logger.warning_once(
                "The backbone has parameters that require gradients, such as an adapter's, but "
                "train_backbone=False, so they get none. Set config.train_backbone=True to train them."
            )
        with torch.no_grad():
            outputs, states = self.run_pass({"use_cache": False, **inputs}, num_logits=1)
        return {name: outputs[name] for name in outputs if name != "logits"}, states

    def head_states(
        self, num_logits: int | None = None
    ) -> AbstractContextManager[list[torch.Tensor]]:
        """Collect the heads' input in each pass of the backbone inside the block, see `states_lmtp`."""
        return head_states(self.backbone, self.config.head_input, num_logits)

    def run_pass(
        self, inputs: dict[str, Any], num_logits: int | None = None
    ) -> tuple[ModelOutput, torch.Tensor]:
        """Run the backbone once; return its output and the heads' input, see `states_lmtp`."""
        return run_pass(self.backbone, self.config.head_input, inputs, num_logits)

    @property
    def context_widths(self) -> tuple[int, ...]:
        """The largest number of following tokens that each head sees, `(m,)`."""
        return context_widths(self.config.leap_offsets, self.config.head_context)

    def draft_unembeddings(self) -> list[HeadUnembedding]:
        """Return each head's unembedding, from `(…, H)` to logits of the draft vocabulary `(…, D)`."""
        token_ids = self.config.draft_token_ids if self.config.share_lm_head else None
        shared = shared_unembedding(self.backbone, token_ids)
        return self.leap_heads.unembeddings(shared, logit_scale(self.backbone))

    def leap_logits(
        self,
        head: int,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        look_back: int = 0,
    ) -> torch.Tensor:
        """Return one head's logits from every state, as they would be in a draft with that look-back.

        Args:
            head: its index.
            hidden_states: `(B, L, H)`, the backbone's last hidden states.
            input_ids: `(B, L)`; only grounded heads need them.
            look_back: a grounded head sees up to `look_back + 1` following tokens; a path-grounded head
                sees all up to its target.

        Returns:
            `(B, L, V)`, or `(B, L, D)` with a draft vocabulary; `[:, s]` predicts the token at
            `s + leap_offsets[head]`.
        """
        width, context = self.context_widths[head], None
        if width:
            if input_ids is None:
                raise ValueError("Grounded heads (head_context > 0) need input_ids.")
            # With `logits_to_keep`, there are states of the last tokens only
            tokens, exists = following_tokens(input_ids[:, -hidden_states.shape[1] :], width)
            offset = self.config.leap_offsets[head]
            seen = num_visible(offset, look_back, self.config.head_context)
            visible = exists & (torch.arange(width, device=tokens.device) < seen)
            context = embed_context(self.get_input_embeddings(), tokens, visible)
        return self.draft_unembeddings()[head](self.leap_heads(head, hidden_states, context))

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the backbone's unembedding, which leap heads may share."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the backbone's unembedding."""
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Resize the vocabulary of the backbone and of the heads' own unembeddings.

        New rows of a head are copies of the backbone's. A draft vocabulary does not change.

        Raises:
            ValueError: the new vocabulary would not contain the draft vocabulary.
        """
        draft_ids = self.config.draft_token_ids
        if new_num_tokens is not None and draft_ids is not None and draft_ids[-1] >= new_num_tokens:
            raise ValueError(
                f"draft_token_ids go up to {draft_ids[-1]}, beyond a vocabulary of {new_num_tokens}. "
                "Keep more tokens, or start from a model with another draft vocabulary."
            )
        embeddings = self.backbone.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if draft_ids is None:
            self.leap_heads.resize_vocabulary(self.backbone)
        return embeddings
