"""`generate(use_lmtp=True)` emits what `generate()` emits, whatever is drafted."""

from __future__ import annotations

import pytest
import torch
from architectures import REPRESENTATIVE, tiny_causal_lm
from drafters import CHAIN, RULES, TREE, Oracle, acceptance_lengths, always
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.acceptance_lmtp import GreedyAcceptor, LockstepAcceptor
from modeling_lmtp.drafting_lmtp import Candidates
from modeling_lmtp.selection_lmtp import TokenSelector
from modeling_lmtp.support_lmtp import decoding_tier
from modeling_lmtp.tree_lmtp import DraftTree

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])
LENGTH = PROMPT.shape[1]
GREEDY = {"do_sample": False}
CHAINS = ("gpt_neo", "falcon_alibi", "bloom", "mpt", "lfm2", "qwen3_next")
REFUSED = ("minimax", "mamba")
TREES = tuple(name for name in REPRESENTATIVE if name not in (*CHAINS, *REFUSED))
SHAPES = {"chain": CHAIN, "tree": TREE}
CASES = [(name, shape) for name in TREES for shape in SHAPES] + [(n, "chain") for n in CHAINS]

every_case = pytest.mark.parametrize(("architecture", "shape"), CASES)


def wrapped(architecture: str = "llama", **settings) -> LMTPForCausalLM:
    return LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), **settings)


def plain_tokens(model: LMTPForCausalLM, prompt: torch.Tensor = PROMPT, **options) -> torch.Tensor:
    """What the backbone's own `generate` gives, run on the backbone itself."""
    return model.backbone.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def leap(model: LMTPForCausalLM, prompt: torch.Tensor = PROMPT, **options):
    options = {"attention_mask": torch.ones_like(prompt), **options}
    return model.generate(prompt, use_lmtp=True, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
@every_case
def test_greedy_decoding_emits_plain_tokens(architecture, shape, right):
    model, tree = wrapped(architecture), SHAPES[shape]
    plain = plain_tokens(model, max_new_tokens=40, **GREEDY)
    output = leap(model, max_new_tokens=40, drafter=Oracle(plain, tree, right), **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    expected = acceptance_lengths(LENGTH, LENGTH + 40, tree.depth, right)
    assert output.acceptance_lengths[0] == expected
    occurring = {"always": {5, 4}, "never": {1}, "sometimes": {1, 2, 3, 4, 5}}[right.__name__]
    assert set(expected) == occurring


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5, "temperature": 1.3},
        {"top_p": 0.8, "top_k": 0},
    ],
    ids=str,
)
@every_case
def test_sampling_draws_plain_tokens_from_the_same_seed(architecture, shape, sampling):
    model, tree = wrapped(architecture), SHAPES[shape]
    options = {"do_sample": True, "max_new_tokens": 24, **sampling}
    torch.manual_seed(5)
    plain = plain_tokens(model, **options)
    state_after_plain = torch.get_rng_state()
    torch.manual_seed(5)
    output = leap(model, drafter=Oracle(plain, tree, RULES["sometimes"]), **options)
    assert output.sequences.tolist() == plain.tolist()
    assert torch.equal(torch.get_rng_state(), state_after_plain)
    assert set(output.acceptance_lengths[0]) >= {1, 2, 3}


@pytest.mark.parametrize("right_depth", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_draft_is_accepted_up_to_its_first_wrong_token(shape, right_depth):
    model, tree = wrapped(), SHAPES[shape]
    plain = plain_tokens(model, max_new_tokens=61, **GREEDY)
    drafter = Oracle(plain, tree, right_depth=right_depth)
    output = leap(model, max_new_tokens=61, drafter=drafter, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths[0] == [1 + right_depth] * (60 // (1 + right_depth))


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 6, 7, 11, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_generation_ends_inside_a_draft_where_plain_decoding_ends(shape, max_new_tokens):
    model, tree = wrapped(), SHAPES[shape]
    plain = plain_tokens(model, max_new_tokens=30, **GREEDY)
    drafter = Oracle(plain, tree)
    output = leap(model, max_new_tokens=max_new_tokens, drafter=drafter, **GREEDY)
    assert output.sequences.tolist() == plain[:, : LENGTH + max_new_tokens].tolist()
    assert 1 + sum(output.acceptance_lengths[0]) == max_new_tokens


@every_case
def test_a_prompt_of_one_token_is_enough(architecture, shape):
    model, prompt = wrapped(architecture), torch.tensor([[7]])
    plain = plain_tokens(model, prompt, max_new_tokens=12, **GREEDY)
    drafter = Oracle(plain, SHAPES[shape])
    output = leap(model, prompt, max_new_tokens=12, drafter=drafter, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths[0] == [5, 5, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_positions_are_filled_to_the_very_last_one(shape):
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm("gpt2", n_positions=32))
    plain = plain_tokens(model, max_new_tokens=32 - LENGTH, **GREEDY)
    assert plain.shape[1] == 32
    for right in RULES.values():
        drafter = Oracle(plain, SHAPES[shape], right)
        output = leap(model, max_new_tokens=32 - LENGTH, drafter=drafter, **GREEDY)
        assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("right", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [(name, "tree") for name in ("mistral", "gemma2", "gemma3_text", "llama4_text", "gpt_oss")]
    + [("mistral", "chain"), ("llama4_text", "chain"), ("gpt_neo", "chain")],
)
def test_a_window_is_left_far_behind(architecture, shape, right):
    model = wrapped(architecture)  # a window, or chunks, of 16 tokens
    plain = plain_tokens(model, max_new_tokens=80, **GREEDY)
    drafter = Oracle(plain, SHAPES[shape], right)
    output = leap(model, max_new_tokens=80, drafter=drafter, **GREEDY)
    assert output.sequences.tolist() == plain.tolist()
    assert output.acceptance_lengths[0] == acceptance_lengths(LENGTH, LENGTH + 80, 4, right)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "lfm2"])
def test_nothing_leaks_from_one_call_to_the_next(architecture):
    model = wrapped(architecture, leap_offsets=(2, 3, 5))
    prompts = [PROMPT, torch.tensor([[60, 2, 31, 8, 8, 8, 90, 14]])]
    options = {**GREEDY, "max_new_tokens": 20, "draft_length": 4}
    fresh = [
        leap(wrapped(architecture, leap_offsets=(2, 3, 5)), prompt, **options) for prompt in prompts
    ]
    for _ in range(2):
        for prompt, expected in zip(prompts, fresh, strict=True):
            output = leap(model, prompt, **options)
            assert output.sequences.tolist() == expected.sequences.tolist()
            assert output.acceptance_lengths[0] == expected.acceptance_lengths[0]


def test_greedy_decoding_leaves_the_random_generator_alone():
    model = wrapped()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    leap(model, max_new_tokens=10, **GREEDY)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_drafter_is_asked_once_per_pass_and_told_the_room():
    model = wrapped()
    plain = plain_tokens(model, max_new_tokens=20, **GREEDY)
    drafter = Oracle(plain, TREE, RULES["sometimes"])
    output = leap(model, max_new_tokens=20, drafter=drafter, **GREEDY)
    known, expected = LENGTH + 1, []
    for accepted in output.acceptance_lengths[0]:
        # Candidates, and the bonus token after them, must fit into what is left
        expected.append((known, LENGTH + 20 - known - 1))
        known += accepted
    assert drafter.asked == expected


def random_tree(generator: torch.Generator) -> DraftTree:
    paths: list[tuple[int, ...]] = [()]
    for _ in range(12):
        parent = paths[int(torch.randint(len(paths), (), generator=generator))]
        rank = sum(1 for path in paths if path[:-1] == parent and len(path) == len(parent) + 1)
        paths.append((*parent, rank))
    return DraftTree.from_paths(paths[1:])


@pytest.mark.parametrize("eos_token_ids", [[], [2], [0, 4]], ids=str)
@pytest.mark.parametrize("max_length", [6, 7, 8, 40])
def test_the_greedy_acceptor_accepts_what_the_lockstep_acceptor_accepts(max_length, eos_token_ids):
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length)])
    if eos_token_ids:
        criteria.append(EosTokenCriteria(eos_token_ids))
    config = GenerationConfig(do_sample=False)
    selector = TokenSelector(LogitsProcessorList(), criteria, config)
    assert selector.is_plain_greedy
    depths = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        tree = random_tree(generator)
        # Six tokens only, so that candidates are often right; siblings may even be the same
        candidate_ids = torch.randint(6, (1, tree.num_nodes), generator=generator)
        logits = torch.randn(1, 1 + tree.num_nodes, 6, generator=generator)
        arguments = (Candidates((tree,), candidate_ids), logits, [0])
        [path] = GreedyAcceptor([LENGTH], selector).accept(*arguments)
        assert [path] == LockstepAcceptor(PROMPT, selector).accept(*arguments)
        assert len(path.nodes) == len(path.tokens)
        depths.add(len(path.nodes))
    assert depths >= set(range(1, min(max_length - LENGTH, 3) + 1))


@pytest.mark.parametrize("architecture", ["llama", "mamba", "gemma2"])
def test_without_the_flag_generation_is_the_backbone_s(architecture):
    model = wrapped(architecture)
    for options in ({**GREEDY}, {"num_beams": 2, **GREEDY}, {"do_sample": True, "top_k": 9}):
        torch.manual_seed(3)
        plain = plain_tokens(model, max_new_tokens=8, **options)
        torch.manual_seed(3)
        ours = model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, **options
        )
        assert ours.tolist() == plain.tolist()


def test_a_right_draft_saves_passes():
    model = wrapped()
    plain = plain_tokens(model, max_new_tokens=26, **GREEDY)
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(None))
    decoding_tier(model.backbone)  # tried once per model and its hooks, with passes of its own
    calls.clear()
    leap(model, max_new_tokens=26, drafter=Oracle(plain, CHAIN, always), **GREEDY)
    assert len(calls) == 1 + 25 // 5
