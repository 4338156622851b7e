"""The passes in which vLLM's model runners ask a draft model for a draft, played without vLLM."""

from __future__ import annotations

from typing import Any

import torch


def first_runner(
    heads: Any,
    model: Any,
    texts: list[torch.Tensor],
    states: list[torch.Tensor],
    drafts: torch.Tensor | None = None,
):
    """All tokens of all requests in the first pass, one row per request in the others, no step said.

    Args:
        heads: `ChainHeads`.
        model: the `LMTPForCausalLM` they stand on.
        texts: of each request the known tokens `(L,)`; the last one has no state yet.
        states: of each request the states of the other tokens, `(L - 1, H)`.
        drafts: the drafts `(requests, heads)` to follow; None follows the likeliest tokens.

    Returns:
        Logits `(requests, heads, vocabulary size)`; a draft is their argmax.
    """
    input_ids = torch.cat([text[1:] for text in texts])
    last = torch.tensor([len(text) - 1 for text in texts]).cumsum(0) - 1
    # Rows that pad a captured graph hold what an earlier pass left there
    stale = heads(input_ids[:2], torch.cat(states)[-2:])
    passed = heads(_padded(input_ids), torch.cat([*states, stale]))[last]
    logits: list[torch.Tensor] = []
    for step in range(len(heads.widths)):
        if step:
            stale = torch.cat(states)[:2]
            new = _followed(logits, drafts)
            passed = heads(_padded(new), torch.cat([passed, stale]))[: len(texts)]
        logits.append(_logits(heads, model, passed, heads.step_of(passed)))
    return torch.stack(logits, dim=1)


def _padded(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([input_ids, input_ids.new_zeros(2)])


def second_runner(
    heads: Any,
    model: Any,
    texts: list[torch.Tensor],
    states: list[torch.Tensor],
    drafts: torch.Tensor | None = None,
):
    """All rows in every pass, the tokens moved up by one before each, and the step said."""
    input_ids = [text[1:] for text in texts]
    last = torch.tensor([len(text) - 1 for text in texts]).cumsum(0) - 1
    passed = torch.cat(states)
    logits: list[torch.Tensor] = []
    for step in range(len(heads.widths)):
        if step:
            new = _followed(logits, drafts).unbind()
            input_ids = [
                torch.cat([ids[1:], token[None]]) for ids, token in zip(input_ids, new, strict=True)
            ]
        passed = heads(torch.cat(input_ids), passed)
        logits.append(_logits(heads, model, passed[last], step))
    return torch.stack(logits, dim=1)


def _followed(logits: list[torch.Tensor], drafts: torch.Tensor | None) -> torch.Tensor:
    return logits[-1].argmax(dim=-1) if drafts is None else drafts[:, len(logits) - 1]


def _logits(heads: Any, model: Any, passed: torch.Tensor, step: int) -> torch.Tensor:
    features = heads.features(passed, step, model.get_input_embeddings())
    drafted = heads.draft_logits(features, step, shared_logits(heads, model))
    logits = heads.logits(drafted)
    assert logits.argmax(dim=-1).tolist() == heads.top_tokens(drafted).tolist()
    return logits


def shared_logits(heads: Any, model: Any) -> Any:
    """Return what applies the backbone's unembedding to features, for the draft vocabulary."""
    ids = slice(None) if heads.draft_token_ids is None else heads.draft_token_ids
    return lambda features: model.get_output_embeddings()(features)[:, ids]
