"""Leap heads as vLLM drafts with them: one head and one token per pass, in plain torch.

What vLLM itself adds is in `vllm_draft_model`; this file needs no vLLM, so that its arithmetic is tested
wherever the package is.

Shapes: `N` rows of a pass, `B` rows that a token is drafted for, `H` hidden size, `V` vocabulary size, `D`
draft vocabulary size, or `V` without one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from modeling_lmtp.heads_lmtp import LeapHead, LeapHeads
from modeling_lmtp.leaps_lmtp import context_widths, embed_context
from modeling_lmtp.unembeddings_lmtp import HeadUnembedding, LowRankUpdate

from . import vllm_tickets as tickets

PREFIX = "leap_heads."


class ChainHeads(nn.Module):
    """Drafts a chain, head `i` its token `i`, with heads of offsets 2, 3, 4, …

    Args:
        config: an `LMTPConfig` that `vllm_config.reasons_against` has nothing against.
        max_rows: `N` at most.
    """

    states: torch.Tensor
    draft_token_ids: torch.Tensor | None

    def __init__(self, config: Any, max_rows: int) -> None:
        super().__init__()
        text_config = config.get_text_config()
        self.hidden_size, self.vocab_size = text_config.hidden_size, text_config.vocab_size
        self.widths = context_widths(config.leap_offsets, config.head_context)
        self.leap_heads = LeapHeads(self._new_head(config, width) for width in self.widths)
        self.num_tokens = max(self.widths)
        self.register_buffer("states", torch.zeros(max_rows, self.hidden_size), persistent=False)
        ids = config.draft_token_ids
        self.register_buffer(
            "draft_token_ids", None if ids is None else torch.tensor(ids), persistent=False
        )

    def _new_head(self, config: Any, width: int) -> LeapHead:
        ids = config.draft_token_ids
        num_rows, rank = self.vocab_size if ids is None else len(ids), config.lm_head_rank
        head = LeapHead(
            self.hidden_size,
            config.num_head_layers,
            context_size=width * self.hidden_size,
            lm_head_update=LowRankUpdate(self.hidden_size, rank, num_rows) if rank else None,
        )
        if not config.share_lm_head:
            head.lm_head = nn.Linear(self.hidden_size, num_rows, bias=False)
        return head

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the heads among a checkpoint's tensors, and return the names of our parameters.

        Raises:
            ValueError: some are missing, others are not the configuration's.
        """
        found = {name.removeprefix(PREFIX): t for name, t in tensors if name.startswith(PREFIX)}
        for index, head in enumerate(self.leap_heads):
            # The backbone's unembedding may have a bias, which the configuration does not say
            if head.lm_head is not None and f"{index}.lm_head.bias" in found:
                head.lm_head.bias = nn.Parameter(torch.zeros_like(head.lm_head.weight[:, 0]))
        expected = self.leap_heads.state_dict()
        wrong = sorted(expected.keys() ^ found.keys())
        if wrong:
            raise ValueError(
                f"The checkpoint's heads are not those that its config.json describes: "
                f"{', '.join(wrong[:5])} {'are' if len(wrong) > 1 else 'is'} missing or unexpected."
            )
        self.leap_heads.load_state_dict(found)
        return {PREFIX + name for name in expected}

    def forward(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Take a pass's rows: `(N,)` and `(N, H)`, states or tickets; return tickets `(N, H)`.

        The last rows may be padding, with what an earlier pass left there. The first row is not, so it
        tells whether a draft begins.
        """
        rows = self.states[: hidden_states.shape[0]]
        is_ticket = tickets.are_tickets(hidden_states)
        begins = ~is_ticket[:1] & ~is_ticket
        rows.copy_(torch.where(begins[:, None], hidden_states, rows))
        return tickets.issue(hidden_states, input_ids, self.num_tokens)

    def step_of(self, passed: torch.Tensor) -> int:
        """Return which pass tickets `(B, H)` come from, at the price of a copy to the host."""
        return int(tickets.read(passed[:1], self.num_tokens).steps)

    def features(self, passed: torch.Tensor, step: int, embeddings: Any) -> torch.Tensor:
        """Map tickets `(B, H)` of a pass to what the head's unembedding reads, `(B, H)`."""
        fields = tickets.read(passed, self.num_tokens)
        # Rows that only pad a captured graph may hold no ticket
        states = self.states[fields.rows.clamp(0, len(self.states) - 1)]
        context = None
        if self.widths[step]:
            context = embed_context(embeddings, fields.tokens[:, : self.widths[step]])
        return self.leap_heads(step, states, context)

    def draft_logits(
        self, features: torch.Tensor, step: int, shared: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Map features `(B, H)` to `(B, D)`.

        Args:
            features: see `features`.
            step: of the pass.
            shared: what the backbone's unembedding gives for `(B, H)`, `(B, D)`.
        """
        head = self.leap_heads[step]
        return HeadUnembedding(head.lm_head or shared, head.lm_head_update)(features)

    def logits(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """Spread `(B, D)` over the vocabulary, `(B, V)`: what is never drafted gets minus infinity."""
        if self.draft_token_ids is None:
            return draft_logits
        spread = draft_logits.new_full((draft_logits.shape[0], self.vocab_size), -torch.inf)
        spread[:, self.draft_token_ids] = draft_logits
        return spread

    def top_tokens(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """Return the likeliest tokens `(B,)`."""
        best = draft_logits.argmax(dim=-1)
        return best if self.draft_token_ids is None else self.draft_token_ids[best]
