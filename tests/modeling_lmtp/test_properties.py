"""Whatever is drafted, whatever is asked for: `generate(use_lmtp=True)` emits what `generate()` emits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from batches import (
    CHAIN,
    OwnProcessor,
    assert_same_cache,
    assert_same_states,
    assert_same_steps,
    largest_draft,
    num_emitted,
    padded,
    wrapped,
)
from drafters import Oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.drafting_lmtp import Candidates
from modeling_lmtp.transformers_lmtp import cache_of
from modeling_lmtp.tree_lmtp import DraftTree

VOCAB = 96
PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"suppress_tokens": list(range(0, VOCAB, 3))},
    {"bad_words_ids": [[5], [7, 8]]},
    {"logits_processor": [OwnProcessor()]},
]
SAMPLING: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6},
    {"do_sample": True, "top_k": 4, "temperature": 1.5},
    {"do_sample": True, "top_p": 0.7, "top_k": 0},
]
DRAFTS: list[dict[str, Any]] = [
    *[{}, {"draft_length": 1}, {"draft_nodes": 7}],
    {"prompt_lookup_num_tokens": 3},
]
OUTPUTS = ("output_scores", "output_logits", "output_hidden_states")


@dataclass
class Case:
    """One call of `generate`.

    Args:
        prompt_lengths: one per row.
        common_padding: before the longest of them, too.
        max_new_tokens: at most so many.
        ends: the tokens that plain decoding emits at these rows and steps end a text.
        processors, sampling, outputs: options.
        offsets: of leap heads, which draft as `draft` says; None for a `RandomDrafter`.
        draft: options.
        accuracy, max_nodes: of the `RandomDrafter`.
        seed: of all random numbers.
    """

    prompt_lengths: list[int]
    common_padding: int
    max_new_tokens: int
    ends: list[tuple[int, int]]
    processors: list[dict[str, Any]]
    sampling: dict[str, Any]
    outputs: set[str]
    offsets: tuple[int, ...] | None
    draft: dict[str, Any]
    accuracy: float
    max_nodes: int
    seed: int

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return random prompts."""
        generator = torch.Generator().manual_seed(self.seed)
        prompts = [
            torch.randint(1, VOCAB, (length,), generator=generator).tolist()
            for length in self.prompt_lengths
        ]
        return padded(prompts, more=self.common_padding)

    def generate(self, model: PreTrainedModel, **options: Any) -> Any:
        """Generate as this case asks, with more options."""
        asked: dict[str, Any] = {"return_dict_in_generate": True, **self.sampling}
        asked |= {"max_new_tokens": self.max_new_tokens, **dict.fromkeys(self.outputs, True)}
        for processor in self.processors:
            asked |= processor
        if "min_new_tokens" in asked:
            asked["min_new_tokens"] = min(asked["min_new_tokens"], self.max_new_tokens)
        torch.manual_seed(self.seed)
        return model.generate(**self.inputs(), **{**asked, **options})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # What makes rows part comes first, and often
    num_rows = draw(st.sampled_from([3, 4, 2, 1, 1]))
    has_heads = draw(st.sampled_from([False, False, True]))
    # Rows that walk apart draw in another order, see test_sampling_distribution.py
    sampling = SAMPLING if num_rows == 1 else []
    offsets = st.sets(st.integers(2, 8), min_size=1, max_size=3)
    return Case(
        draw(st.lists(st.integers(1, 22), min_size=num_rows, max_size=num_rows)),
        common_padding=draw(st.sampled_from([0, 0, 3])),
        max_new_tokens=draw(st.sampled_from([24, 30, 16, 9, 2, 1])),
        ends=draw(st.lists(st.tuples(st.integers(0, 3), st.integers(5, 29)), max_size=2)),
        processors=draw(st.lists(st.sampled_from(PROCESSORS), max_size=2, unique_by=id)),
        sampling=draw(st.sampled_from([{"do_sample": False}, *sampling])),
        outputs=draw(st.sets(st.sampled_from(OUTPUTS))),
        offsets=tuple(sorted(draw(offsets))) if has_heads else None,
        draft=draw(st.sampled_from(DRAFTS)),
        accuracy=draw(st.sampled_from([0.8, 0.7, 0.9, 1.0, 0.0])),
        max_nodes=draw(st.sampled_from([14, 9, 5, 1])),
        seed=draw(st.integers(0, 2**20)),
    )


class RandomDrafter(Oracle):
    """Proposes another random tree for every row and step, with the right tokens along some paths.

    Args:
        texts: prompts and continuations that rows may have, each `(L,)`.
        accuracy: how often a path of right tokens goes on to a child.
        max_nodes: candidates per row.
        takes_trees: else chains.
        seed: of its own.
    """

    num_states = 1

    def __init__(
        self,
        texts: Sequence[torch.Tensor],
        accuracy: float,
        max_nodes: int,
        takes_trees: bool,
        seed: int,
    ) -> None:
        self.texts = [text.tolist() for text in texts]
        self.accuracy = accuracy
        self.max_nodes = max_nodes
        self.takes_trees = takes_trees
        self.generator = torch.Generator().manual_seed(seed)

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        trees = [self._tree().truncate(max_depth) for _ in input_ids]
        token_ids = [
            self._fill(tree, self._continuation(known))
            for tree, known in zip(trees, input_ids.tolist(), strict=True)
        ]
        return Candidates.from_rows(trees, token_ids, input_ids)

    def _tree(self) -> DraftTree:
        num_nodes = self._random(self.max_nodes + 1)
        if not self.takes_trees:
            return DraftTree.chain(min(num_nodes, 5))
        paths: list[tuple[int, ...]] = [()]
        for _ in range(num_nodes):
            # The latest nodes rather than the first, so that trees get deep
            parent = paths[-1 - min(self._random(len(paths)), self._random(len(paths)))]
            paths.append((*parent, sum(path[:-1] == parent for path in paths[1:])))
        return DraftTree.from_paths(paths[1:])

    def _continuation(self, known: list[int]) -> list[int]:
        """What follows in the text that begins as the known tokens end; nothing where none does."""
        if not any(known[-1] in text for text in self.texts):
            return []
        text, place = self._place(known)
        return text[place:]

    def _fill(self, tree: DraftTree, answers: Sequence[int]) -> list[int]:
        token_ids = [self._random(VOCAB) for _ in range(tree.num_nodes)]
        node = 0
        while tree.children[node] and tree.depths[node] < len(answers):
            if torch.rand((), generator=self.generator) >= self.accuracy:
                break
            depth, children = tree.depths[node], tree.children[node]
            node = children[self._random(len(children))]
            token_ids[node - 1] = answers[depth]
        return token_ids

    def _random(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "mistral", "gemma2", "bloom", "lfm2", "qwen3_next"]
)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_any_call_gives_what_plain_decoding_gives(architecture, case):
    backbone = wrapped(architecture).backbone
    takes_trees = largest_draft(wrapped(architecture)) is not CHAIN
    width = case.inputs()["input_ids"].shape[1]
    whole = case.generate(backbone).sequences
    emitted = whole[:, width:]
    ends = [int(emitted[row % len(emitted), step % emitted.shape[1]]) for row, step in case.ends]
    plain = case.generate(backbone, eos_token_id=ends or None)
    state_after_plain = torch.get_rng_state()

    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=case.offsets or ())
    draft = case.draft
    if case.offsets is None:  # it knows the texts as they go without an end, too
        texts = [*whole, *plain.sequences]
        drafter = RandomDrafter(texts, case.accuracy, case.max_nodes, takes_trees, case.seed)
        draft = {"drafter": drafter}
    ours = case.generate(model, eos_token_id=ends or None, use_lmtp=True, **draft)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    if case.sampling["do_sample"]:
        assert torch.equal(torch.get_rng_state(), state_after_plain)
    assert_same_outputs(architecture, ours, plain, num_emitted(plain.sequences[:, width:], ends))
    mask = case.inputs()["attention_mask"]
    cached = plain.sequences.shape[1] - 1  # all but the last token
    mask = torch.cat([mask, mask.new_ones(len(mask), cached - width)], dim=-1)
    assert_same_cache(cache_of(ours), cache_of(plain), mask, architecture)


def assert_same_outputs(architecture: str, ours, plain, lengths: list[int]) -> None:
    assert [1 + sum(accepted) for accepted in ours.acceptance_lengths] == lengths
    for name in ("scores", "logits"):
        if getattr(plain, name) is not None:
            own, other = getattr(ours, name), getattr(plain, name)
            assert_same_steps(own, other, lengths, architecture)
    if plain.hidden_states is not None:
        assert_same_states(ours.hidden_states, plain.hidden_states, lengths, architecture)
