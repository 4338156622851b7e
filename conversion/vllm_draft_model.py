"""The draft model that vLLM runs, and nothing else imports: leap heads beside the model being served.

Shapes: `N` rows of a pass, `B` rows that a token is drafted for, `H` hidden size, `V` vocabulary size, `D`
draft vocabulary size, or `V` without one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from .vllm_config import check_target
from .vllm_heads import ChainHeads


class LMTPDraftModel(nn.Module):
    """Drafts with leap heads, as vLLM's method `mtp` asks: a pass and a token at a time.

    Args:
        vllm_config: vLLM's settings.
        prefix: where vLLM puts the model.

    Attributes:
        model: where vLLM puts the served model's `embed_tokens`.
        lm_head: the served model's unembedding, put there by vLLM.

    Raises:
        ValueError: the heads are for another model, or too many tokens are asked for.
    """

    lm_head: Any
    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculation = vllm_config.speculative_config
        self.config = speculation.draft_model_config.hf_config
        self.num_speculative_tokens = speculation.num_speculative_tokens
        target = speculation.target_model_config
        check_target(self.config, target.hf_text_config, self.num_speculative_tokens)
        if get_pp_group().world_size > 1 and self.config.head_context:
            raise ValueError(
                "pipeline_parallel_size > 1 puts the embeddings where leap heads with "
                f"head_context={self.config.head_context!r} cannot read them. Use "
                "tensor_parallel_size, or heads with head_context=0."
            )
        self.model = nn.Module()
        graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.heads = ChainHeads(
            self.config, max(vllm_config.scheduler_config.max_num_batched_tokens, graphs)
        )
        self.logits_processor = LogitsProcessor(self.heads.vocab_size)
        self._rows: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if not vllm_config.use_v2_model_runner:
            self.unused_attention = _unused_attention(vllm_config, target)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens as the served model does."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        """Take a pass's tokens `(N,)` and states or tickets `(N, H)`; return tickets `(N, H)`."""
        if self._rows is None and self.heads.draft_token_ids is not None:
            self._rows = self._rows_of_draft_tokens()  # before any graph is captured
        return self.heads(input_ids, hidden_states)

    def compute_logits(
        self, hidden_states: torch.Tensor, spec_step_idx: int | None = None
    ) -> torch.Tensor:
        """Map tickets `(B, H)` to the logits of the token that comes next in the draft, `(B, V)`."""
        return self.heads.logits(self._draft_logits(hidden_states, spec_step_idx))

    def get_top_tokens(
        self, hidden_states: torch.Tensor, spec_step_idx: int | None = None
    ) -> torch.Tensor:
        """Map tickets `(B, H)` to the likeliest tokens `(B,)` (`use_local_argmax_reduction`)."""
        return self.heads.top_tokens(self._draft_logits(hidden_states, spec_step_idx))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the heads, and leave a full checkpoint's backbone where it is."""
        return {f"heads.{name}" for name in self.heads.load(weights)}

    def _draft_logits(self, passed: torch.Tensor, step: int | None) -> torch.Tensor:
        if step is None:
            # The first model runner does not say it; one token is always drafted by the first head
            step = 0 if self.num_speculative_tokens == 1 else self.heads.step_of(passed)
        embeddings = getattr(self.model, "embed_tokens", None)
        features = self.heads.features(passed, step, embeddings)
        return self.heads.draft_logits(features, step, self._shared_logits)

    def _shared_logits(self, features: torch.Tensor) -> torch.Tensor:
        """Apply the served model's unembedding, `(B, D)`."""
        if self._rows is not None:
            return nn.functional.linear(features, *self._rows)
        logits = self.logits_processor(self.lm_head, features, getattr(self.lm_head, "bias", None))
        if self.heads.draft_token_ids is None:
            return logits
        return logits[:, self.heads.draft_token_ids]

    def _rows_of_draft_tokens(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Copy the unembedding's rows of the draft vocabulary, unless they are sharded or quantized."""
        lm_head, token_ids = self.lm_head, self.heads.draft_token_ids
        method = getattr(lm_head, "quant_method", None)
        weight = getattr(lm_head, "weight", None)
        if (
            get_tensor_model_parallel_world_size() > 1
            or not isinstance(method, UnquantizedEmbeddingMethod)
            or weight is None
            or weight.ndim != 2
            or weight.shape[0] < self.heads.vocab_size
        ):
            return None
        bias = getattr(lm_head, "bias", None)
        return weight[token_ids], None if bias is None else bias[token_ids]


def _unused_attention(vllm_config: VllmConfig, target: Any) -> Attention:
    """Build the attention layer that vLLM's first model runner expects of a draft model; it never runs.

    It shares the cache of a layer of the served model, where one is of its kind: no memory is taken.
    """
    parallel = vllm_config.parallel_config
    layers = vllm_config.compilation_config.static_forward_context
    shared = [name for name, layer in layers.items() if type(layer) is Attention]
    return Attention(
        target.get_num_attention_heads(parallel),
        target.get_head_size(),
        scale=1.0,
        num_kv_heads=target.get_num_kv_heads(parallel),
        cache_config=vllm_config.cache_config,
        kv_sharing_target_layer_name=shared[0] if shared else None,
        prefix=f"draft.layers.{target.hf_text_config.num_hidden_layers}.unused_attention",
    )
