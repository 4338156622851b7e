"""Measures how long a decoding step takes with each of some draft trees."""

import statistics
from collections.abc import Sequence

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.tree_lmtp import DraftTree

from .bench_runner import make_batches
from .pass_clock import PassClock

ROUNDS = 2
NEW_TOKENS = 24
WARM_STEPS = 2  # at the start of each call
ANY_TOKEN = 0


def step_seconds(
    model: LMTPForCausalLM,
    prompts: Sequence[list[int]],
    trees: Sequence[DraftTree],
    batch_size: int,
    *,
    rounds: int = ROUNDS,
) -> dict[DraftTree, float]:
    """Time decoding steps with each tree in turn; the empty tree is plain decoding.

    Args:
        model: the checkpoint.
        prompts: token ids to start from, a few of which are used.
        trees: what to draft.
        batch_size: prompts decoded together.
        rounds: how many batches of prompts; one more warms up.

    Returns:
        The median seconds of a step, from the start of its pass to the start of the next.
    """
    ordered = sorted(prompts, key=len)
    middle = [ordered[len(ordered) // 2]]  # of the same length, so that rounds can be compared
    [batch] = make_batches({"": middle * batch_size}, batch_size, ANY_TOKEN, model.device)
    times: dict[DraftTree, list[float]] = {tree: [] for tree in trees}
    for turn in range(1 + rounds):
        for tree in trees:
            with PassClock(model.backbone) as clock:
                model.generate(
                    batch.input_ids,
                    attention_mask=batch.attention_mask,
                    do_sample=False,
                    eos_token_id=None,
                    max_new_tokens=NEW_TOKENS,
                    use_lmtp=bool(tree.num_nodes),
                    draft_tree=[list(path) for path in tree.paths],
                )
            full = max(1, len(clock.step_seconds) - tree.depth)  # the last ones draft less
            if turn:
                times[tree] += clock.step_seconds[:full][WARM_STEPS:] or clock.step_seconds[:1]
    return {tree: statistics.median(measured) for tree, measured in times.items()}
