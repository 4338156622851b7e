"""Every architecture of `architectures`: what is found out about it, and that its text is plain decoding's.

`benchmarks/architectures.md` shows the same examinations as a table.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import matrix
import pytest
from architectures import ARCHITECTURES
from matrix import Comparison, Examination, examine
from transformers import Mamba2ForCausalLM
from transformers.masking_utils import create_chunked_causal_mask

from modeling_lmtp.support_lmtp import Tier

# Transformers 5.15 scripts functions of gpt_bigcode, which torch is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

# All others verify trees
CHAINS = {
    *("bamba", "bloom", "falcon_alibi", "falcon_h1", "gpt_neo", "granitemoehybrid", "lfm2", "mpt"),
    *("nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "roformer", "zamba2"),
}
# Since Transformers 5.24, state-space models have the cache that all others have
if "cache" in inspect.signature(Mamba2ForCausalLM.forward).parameters:
    CHAINS.add("mamba2")
# In all others, each row of a batch goes on as far as its own draft was right
IN_STEP = CHAINS - {"bloom", "falcon_alibi", "gpt_neo", "lfm2"}
PLAIN = {
    *("falcon_mamba", "jamba", "mamba", "mamba2", "minimax", "openai-gpt", "recurrent_gemma"),
    *("rwkv", "xlstm"),
}
if "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters:
    CHAINS.add("llama4_text")  # such a release of Transformers cannot make masks of chunks


def check_one_prompt(found: Examination, shapes: tuple[str, ...]) -> None:
    """Check that greedy texts and samples are plain decoding's, however much is accepted."""
    assert not different(found.greedy)
    assert not different(found.sampling)
    for shape in shapes:
        [never] = found.greedy[f"{shape}, never right"].acceptance_lengths
        [always] = found.greedy[f"{shape}, always right"].acceptance_lengths
        [some] = found.greedy[f"{shape}, sometimes"].acceptance_lengths
        [sampled] = found.sampling[shape].acceptance_lengths
        assert set(never) == {1}
        assert set(always[:-1]) == {5}
        assert set(some) == set(sampled) == {1, 2, 3, 4, 5}
    assert max(found.distinct_tokens) >= 4, "a text that only repeats itself"


def check_batches(found: Examination, shapes: tuple[str, ...]) -> None:
    """Check that batches are plain decoding's, and their rows the texts of their prompts alone."""
    assert not different(found.batch)
    assert found.plain_rows_are_independent
    for shape in shapes:
        lengths = found.batch[shape].acceptance_lengths
        assert len({tuple(row) for row in lengths}) == (3 if found.ragged else 1)
        assert {length for row in lengths for length in row} >= {1, 2, 3}


def different(comparisons: dict[str, Comparison]) -> list[str]:
    return [name for name, comparison in comparisons.items() if not comparison.equal]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_texts_are_plain_decoding_s(architecture):
    found = examine(architecture)
    if not found.plain_is_consistent:  # roformer in Transformers 5.15
        pytest.skip("plain decoding with a cache differs from a pass over its whole text")
    expected = Tier.CHAIN if architecture in CHAINS else Tier.TREE
    if architecture in PLAIN - CHAINS:
        expected = Tier.PLAIN
    assert found.tier == expected.value, found.reason
    assert found.ragged == (architecture not in PLAIN | IN_STEP)
    if expected is Tier.PLAIN:
        assert not different(found.greedy)
        return
    shapes = ("tree", "chain") if expected is Tier.TREE else ("chain",)
    check_one_prompt(found, shapes)
    check_batches(found, shapes)


def test_every_architecture_is_of_one_kind():
    names = [name for names in matrix.KINDS.values() for name in names.split()]
    assert sorted(names) == sorted(ARCHITECTURES)


def test_the_page_tells_what_differs():
    same, other = Comparison(True, [[5]]), Comparison(False, [[1]])
    found = Examination("a", "dense", "chain", "no trees: a|b", True, True)
    found.greedy = {"chain, never right": same, "chain, sometimes": other}
    found.sampling, found.batch = {"chain": same}, {"chain": same}
    versions = {"transformers": "5.0", "torch": "2.0"}
    page = matrix.report([found], versions)
    assert "Of 1 architectures, 0 verify trees, 1 chains, and 0 are decoded plainly." in page
    row = "| `a` | dense | chain | ragged | differs: chain, sometimes | equal | equal, but not to"
    assert row in page
    assert page.endswith("| a\\|b |\n")


def test_the_page_in_the_repository_is_of_these_architectures():
    page = (Path(matrix.BENCHMARKS) / "architectures.md").read_text()
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == list(ARCHITECTURES)
    assert "differs" not in page
