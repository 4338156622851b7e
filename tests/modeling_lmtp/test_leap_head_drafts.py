"""Drafts of leap heads, against candidates computed one by one with the formulas of the method."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import tiny_causal_lm

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.drafting_lmtp import Drafter
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.support_lmtp import Tier
from modeling_lmtp.tree_lmtp import DraftTree

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (2, 3), (0, 0, 0), (2, 3, 1), (2, 3, 1, 0)]
EVENLY_SPACED = {(3, 5, 7): 2, (2, 3, 4): 1, (4, 7): 3}  # offsets: k
UNEVEN = [(2, 3, 5), (2, 6)]
PROMPTS = {1: [[3]], 2: [[3, 7]], 5: [[3, 7, 5, 9, 4]]}


class Recording(Drafter):
    """Passes on to another drafter, and keeps what it was given and gave."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.num_states = drafter.num_states
        self.drafted: list[tuple[torch.Tensor, int, DraftTree, torch.Tensor]] = []

    def draft(self, input_ids, hidden_states, max_depth):
        candidates = self.drafter.draft(input_ids, hidden_states, max_depth)
        self.drafted.append((input_ids, max_depth, candidates.trees[0], candidates.token_ids))
        return candidates


def wrapped(offsets: tuple[int, ...], share_lm_head: bool) -> LMTPForCausalLM:
    # Twelve tokens, so that random heads are right now and then
    backbone = tiny_causal_lm("llama", vocab_size=12)
    model = LMTPForCausalLM.from_backbone(
        backbone, leap_offsets=offsets, num_head_layers=2, share_lm_head=share_lm_head
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def head_and_look_back(offsets: tuple[int, ...], distance: int) -> tuple[int, int]:
    """Which head, counted from 0, and which earlier state serve a distance (method.md)."""
    if offsets in EVENLY_SPACED:
        k = EVENLY_SPACED[offsets]
        i = math.ceil(distance / k)
        return i - 1, k * i - distance
    head = min(i for i, offset in enumerate(offsets) if offset >= 1 + distance)
    return head, offsets[head] - 1 - distance


@torch.no_grad()
def naive_candidates(
    model: LMTPForCausalLM, input_ids: torch.Tensor, max_depth: int, tree: DraftTree
) -> dict[tuple[int, ...], int]:
    """The candidate of each node of `tree` that can be drafted, by its path, computed afresh."""
    states = model.backbone.model(input_ids).last_hidden_state[0]
    t = input_ids.shape[1] - 1  # the root is x_{t+1}; h_s is states[s - 1]
    candidates = {}
    for path in tree.paths:
        distances = range(1, len(path) + 1)
        served = [head_and_look_back(model.config.leap_offsets, a) for a in distances]
        if len(path) > max_depth or any(t - look_back < 1 for _, look_back in served):
            continue
        head, look_back = served[-1]
        z = states[t - look_back - 1]
        for block in model.leap_heads[head].blocks:
            y = block.linear.weight @ z + block.linear.bias
            z = z + y * torch.sigmoid(y)
        unembedding = model.leap_heads[head].lm_head or model.backbone.lm_head
        ranked = (unembedding.weight @ z).argsort(descending=True)
        candidates[path] = int(ranked[path[-1]])
    return candidates


@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=lambda prompt: f"prompt {len(prompt[0])}")
@pytest.mark.parametrize("shape", ["tree", "chain"])
@pytest.mark.parametrize("offsets", [*EVENLY_SPACED, *UNEVEN], ids=str)
def test_every_draft_is_what_the_formulas_give(offsets, shape, prompt, share_lm_head):
    model = wrapped(offsets, share_lm_head)
    horizon = offsets[-1] - 1
    tree = DraftTree.chain(horizon)
    if shape == "tree":
        tree = DraftTree.from_paths(PATHS).truncate(horizon)
    recording = Recording(model.new_drafter(LMTPSettings(draft_tree=tree.paths), Tier.TREE))
    prompt = torch.tensor(prompt)
    options = {"do_sample": False, "max_new_tokens": 40, "attention_mask": torch.ones_like(prompt)}
    output = model.generate(
        prompt, use_lmtp=True, drafter=recording, return_dict_in_generate=True, **options
    )
    assert output.sequences.tolist() == model.backbone.generate(prompt, **options).tolist()

    tokens, lengths = output.sequences[0].tolist(), []
    for input_ids, max_depth, drafted, candidate_ids in recording.drafted:
        expected = naive_candidates(model, input_ids, max_depth, tree)
        assert dict(zip(drafted.paths, candidate_ids[0].tolist(), strict=True)) == expected
        # The longest path that the text confirms, and the bonus token
        known, path = input_ids.shape[1], ()
        while known + len(path) < len(tokens):
            token = tokens[known + len(path)]
            paths = [p for p in expected if p[:-1] == path and expected[p] == token]
            if not paths:
                break
            path = paths[0]
        lengths.append(min(1 + len(path), len(tokens) - known))
    assert output.acceptance_lengths[0] == lengths
    assert sum(lengths) == 39
    if shape == "tree":
        assert max(lengths) >= 2


def test_a_model_without_leap_heads_and_without_copies_decodes_one_token_per_pass():
    model = wrapped((), share_lm_head=True)
    prompt = torch.tensor(PROMPTS[5])
    output = model.generate(
        prompt,
        use_lmtp=True,
        prompt_lookup_num_tokens=0,
        do_sample=False,
        max_new_tokens=9,
        return_dict_in_generate=True,
    )
    plain = model.generate(prompt, do_sample=False, max_new_tokens=9)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths[0] == [1] * 8
