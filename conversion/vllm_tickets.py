"""Tickets: how a draft model for vLLM tells, in each pass of a draft, where it stands.

vLLM runs a draft model once for each token of a draft. Each pass gets the last token and the tensor that
the pass before returned, as wide as a hidden state: nothing else links the passes of one request, and the
rows are another selection in the second pass than in the first. Leap heads need the backbone's state and
all tokens drafted so far. So a pass returns *tickets* in place of hidden states. Each holds small integers,
exact in bfloat16:

    | seal (4) | step (1) | row (3 digits) | token of step 0 (3 digits) | token of step 1 | …

`row` says where the backbone's state was put in a buffer. A draft then follows from what its passes were
given: nothing is kept per request that a preemption or an abort could leave stale. All shapes are static
and nothing is copied to the host, so that CUDA graphs can capture it.

Shapes: `N` rows of a pass, `H` hidden size, `T` tokens that a ticket holds.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

SEAL_SIZE = 4
BASE = 256  # bfloat16 has all integers up to this
DIGITS = 3
_ROW = SEAL_SIZE + 1
_TOKENS = _ROW + DIGITS


class Fields(NamedTuple):
    """What tickets say."""

    steps: torch.Tensor  # (N,): how many passes came before
    rows: torch.Tensor  # (N,)
    tokens: torch.Tensor  # (N, T)


def ticket_size(num_tokens: int) -> int:
    """Return how many numbers a ticket for `T` tokens takes; hidden states must be as wide."""
    return _TOKENS + DIGITS * num_tokens


def are_tickets(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return which rows of `(N, H)` are tickets and not hidden states, `(N,)`."""
    return (hidden_states[:, :SEAL_SIZE] == _seal(hidden_states)).all(dim=-1)


def issue(hidden_states: torch.Tensor, input_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the tickets of one pass.

    Args:
        hidden_states: `(N, H)`, of each row the backbone's state (a draft begins) or the ticket of the
            pass before.
        input_ids: `(N,)`, the token that follows the state, or was drafted last.
        num_tokens: `T`; later tokens are not kept.

    Returns:
        `(N, H)`, in the hidden states' dtype.
    """
    length, size = hidden_states.shape
    found = are_tickets(hidden_states)[:, None]
    rows = torch.arange(length, device=hidden_states.device)
    steps = torch.where(found, hidden_states[:, SEAL_SIZE:_ROW] + 1, 0)
    rows = torch.where(found, hidden_states[:, _ROW:_TOKENS], _digits(rows).to(steps.dtype))
    kept = torch.where(found, hidden_states[:, _TOKENS : ticket_size(num_tokens)], 0)
    is_own = steps == torch.arange(num_tokens, device=steps.device)  # (N, T)
    own = _digits(input_ids).to(steps.dtype).repeat(1, num_tokens)
    tokens = torch.where(is_own.repeat_interleave(DIGITS, dim=1), own, kept)
    seal = _seal(steps).expand(length, -1)
    return pad(torch.cat([seal, steps, rows, tokens], dim=1), (0, size - ticket_size(num_tokens)))


def read(tickets: torch.Tensor, num_tokens: int) -> Fields:
    """Return what tickets `(N, H)` say; of rows that are none, anything."""
    numbers = tickets[:, : ticket_size(num_tokens)].long()
    return Fields(
        steps=numbers[:, SEAL_SIZE],
        rows=_from_digits(numbers[:, _ROW:_TOKENS]),
        tokens=_from_digits(numbers[:, _TOKENS:].unflatten(1, (num_tokens, DIGITS)))
        if num_tokens
        else numbers[:, _TOKENS:],
    )


def _seal(like: torch.Tensor) -> torch.Tensor:
    """Return what no hidden state begins with, `(4,)`.

    Computed where it is needed: a graph that is being captured takes no constant from the host.
    """
    return 251 - 29 * torch.arange(SEAL_SIZE, dtype=like.dtype, device=like.device)


def _digits(numbers: torch.Tensor) -> torch.Tensor:
    """Write integers `(N,)` with `DIGITS` digits, `(N, DIGITS)`."""
    return torch.stack([numbers // BASE**place % BASE for place in range(DIGITS)], dim=-1)


def _from_digits(digits: torch.Tensor) -> torch.Tensor:
    places = [digits[..., place] * BASE**place for place in range(DIGITS)]
    return torch.stack(places).sum(dim=0)
