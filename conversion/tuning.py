"""Choosing a draft tree: the most tokens per second that given heads and this device can give."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.evaluation import HeadReport, tokens_per_step
from modeling_lmtp.training.examples import Example
from modeling_lmtp.tree_lmtp import DraftTree, grow_tree

NODE_COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24)
CONTEXT_LENGTH = 200
REPEATS = 5


@dataclass(frozen=True)
class TunedTree:
    """A draft tree and what is expected of it.

    Args:
        tree: the tree; without nodes, drafting cannot win here.
        tokens_per_step: τ, simulated on held-out answers.
        step_cost: a backbone pass over root and candidates, over one with the root alone (drafting
            itself not counted).
    """

    tree: DraftTree
    tokens_per_step: float
    step_cost: float

    @property
    def speed_up(self) -> float:
        """The expected speed-up over plain decoding."""
        return self.tokens_per_step / self.step_cost


def choose_tree(
    model: LMTPForCausalLM,
    report: HeadReport,
    ranks: Sequence[torch.Tensor],
    examples: Sequence[Example],
) -> TunedTree:
    """Pick, among the best trees of several sizes, the one with the highest expected speed-up.

    Args:
        model: for timing on its device.
        report, ranks: what `evaluate_heads` returned for `examples`.
        examples: held-out answers.
    """
    seconds = pass_seconds(model, [1 + nodes for nodes in NODE_COUNTS])
    tuned = []
    for nodes in NODE_COUNTS:
        tree = grow_tree(report.accuracies, nodes)
        if tree.num_nodes == nodes:
            cost = seconds[1 + nodes] / seconds[1]
            tuned.append(TunedTree(tree, tokens_per_step(ranks, examples, tree), cost))
    return max(tuned, key=lambda candidate: candidate.speed_up)


@torch.no_grad()
def pass_seconds(model: LMTPForCausalLM, token_counts: Sequence[int]) -> dict[int, float]:
    """Time backbone passes over some tokens after `CONTEXT_LENGTH` cached ones, interleaved.

    Returns:
        The median seconds for each count of `token_counts`.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    tokens = torch.ones(
        1, CONTEXT_LENGTH + max(token_counts), dtype=torch.long, device=model.device
    )
    model.backbone(input_ids=tokens[:, :CONTEXT_LENGTH], past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    times: dict[int, list[float]] = {count: [] for count in token_counts}
    for _ in range(1 + REPEATS):
        for count in token_counts:
            started = time.perf_counter()
            model.backbone(
                input_ids=tokens[:, -count:], past_key_values=cache, use_cache=True
            ).logits.sum().item()  # waits for the device
            times[count].append(time.perf_counter() - started)
            cache.crop(-count)
    return {count: statistics.median(measured[1:]) for count, measured in times.items()}
