"""The passes in which vLLM's model runners ask a draft model for a draft, played without vLLM."""

from __future__ import annotations

from typing import Any

import torch


def first_runner(heads: Any, model: Any, texts: list[torch.Tensor], states: list[torch.Tensor]):
    """All tokens of all requests in the first pass, one row per request in the others, no step said.

    Args:
        heads: `ChainHeads`.
        model: the `LMTPForCausalLM` they stand on.
        texts: of each request the known tokens `(L,)`; the last one has no state yet.
        states: of each request the states of the other tokens, `(L - 1, H)`.

    Returns:
        Drafts `(requests, heads)`.
    """
    input_ids = torch.cat([text[1:] for text in texts])
    last = torch.tensor([len(text) - 1 for text in texts]).cumsum(0) - 1
    # Rows that pad a captured graph hold what an earlier pass left there
    stale = heads(input_ids[:2], torch.cat(states)[-2:])
    passed = heads(_padded(input_ids), torch.cat([*states, stale]))[last]
    drafts: list[torch.Tensor] = []
    for step in range(len(heads.widths)):
        if step:
            stale = torch.cat(states)[:2]
            passed = heads(_padded(drafts[-1]), torch.cat([passed, stale]))[: len(texts)]
        drafts.append(_tokens(heads, model, passed, heads.step_of(passed)))
    return torch.stack(drafts, dim=1)


def _padded(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([input_ids, input_ids.new_zeros(2)])


def second_runner(heads: Any, model: Any, texts: list[torch.Tensor], states: list[torch.Tensor]):
    """All rows in every pass, the tokens moved up by one before each, and the step said."""
    input_ids = [text[1:] for text in texts]
    last = torch.tensor([len(text) - 1 for text in texts]).cumsum(0) - 1
    passed = torch.cat(states)
    drafts: list[torch.Tensor] = []
    for step in range(len(heads.widths)):
        if step:
            new = drafts[-1].unbind()
            input_ids = [
                torch.cat([ids[1:], token[None]]) for ids, token in zip(input_ids, new, strict=True)
            ]
        passed = heads(torch.cat(input_ids), passed)
        drafts.append(_tokens(heads, model, passed[last], step))
    return torch.stack(drafts, dim=1)


def _tokens(heads: Any, model: Any, passed: torch.Tensor, step: int) -> torch.Tensor:
    features = heads.features(passed, step, model.get_input_embeddings())
    logits = heads.draft_logits(features, step, shared_logits(heads, model))
    tokens = heads.top_tokens(logits)
    assert heads.logits(logits).argmax(dim=-1).tolist() == tokens.tolist()
    return tokens


def shared_logits(heads: Any, model: Any) -> Any:
    """Return what applies the backbone's unembedding to features, for the draft vocabulary."""
    ids = slice(None) if heads.draft_token_ids is None else heads.draft_token_ids
    return lambda features: model.get_output_embeddings()(features)[:, ids]
