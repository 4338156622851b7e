"""Decoding known answers again with any drafter: what each step would emit, and what it would verify.

The backbone does not run: its states are known, and so is the token that it takes after every one of
them. `evaluation.simulated_steps` is the short way for static trees.
"""

from typing import NamedTuple

import torch

from modeling_lmtp.drafting_lmtp import Drafter
from modeling_lmtp.training.examples import Example


class Step(NamedTuple):
    """One step of decoding: the tokens it emits, and the candidates it verifies."""

    tokens: int
    nodes: int


@torch.no_grad()
def simulate(drafter: Drafter, example: Example, states: torch.Tensor) -> list[Step]:
    """Decode an answer again.

    Args:
        drafter: of one model, not used before.
        example: the backbone's own greedy answer; on others it says what would have been right there.
        states: `(L, K·H)`, what the model's heads read of it, see `evaluation.answer_states`.
    """
    input_ids = torch.tensor([example.input_ids], device=states.device)
    length = len(example.input_ids)
    steps, root = [], example.answer_start  # the prefill emits the first root
    while root < length - 1:
        first = max(0, root - drafter.num_states)
        candidates = drafter.draft(
            input_ids[:, : root + 1], states[None, first:root], length - 2 - root
        )
        [tree], [token_ids] = candidates.trees, candidates.token_ids.tolist()
        tokens, node = 0, tree.child(0, example.input_ids[root + 1], token_ids)
        while node is not None:
            tokens += 1
            node = tree.child(node, example.input_ids[root + tokens + 1], token_ids)
        steps.append(Step(tokens + 1, tree.num_nodes))
        root += tokens + 1
    return steps
