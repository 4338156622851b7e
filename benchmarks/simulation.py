"""Simulates decoding of known answers with any drafter: what each step would emit and verify.

The backbone does not run, because its states and the token after each of them are known. For static trees
`evaluation.simulated_steps` is faster.
"""

from typing import NamedTuple

import torch

from modeling_lmtp.drafting_lmtp import Drafter
from modeling_lmtp.training.examples import Example


class Step(NamedTuple):
    """One decoding step: the number of tokens it emits and of candidates it verifies."""

    tokens: int
    nodes: int


@torch.no_grad()
def simulate(drafter: Drafter, example: Example, states: torch.Tensor) -> list[Step]:
    """Simulate the decoding of an answer.

    Args:
        drafter: a new drafter of the model.
        example: a greedy answer of the backbone; for any other answer the result is hypothetical.
        states: `(L, K·H)`, the states that the model's heads read, see `evaluation.answer_states`.
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
