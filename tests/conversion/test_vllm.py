"""vLLM with leap heads writes what Transformers writes, in as many steps as our own chain takes.

Skipped where vLLM is not installed; `.ci/vllm` makes an environment that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import SCRIPTS
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lmtp import LMTPForCausalLM

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

ENGINE = SCRIPTS / "vllm_engine.py"
RUNNERS = {"V1": [], "V2": ["--v2"]}
KINDS = {
    "path": {"head_context": "path"},
    "medusa": {"head_context": 0},
    "grounded": {"head_context": 1, "draft_token_ids": (1, 2, 3, 5, 7, 9, 11)},
    "own": {"head_context": "path", "share_lm_head": False},
    "low_rank": {"head_context": "path", "lm_head_rank": 4, "num_head_layers": 1},
}
LENGTHS = (7, 3, 41, 20)  # shorter and longer than a block, and than a chunk
NEW_TOKENS = 40


def tiny_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,  # random heads are right now and then
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 numbers: vLLM has no attention on CPUs for fewer
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save_heads(base: Path, folder: Path, **settings: Any) -> LMTPForCausalLM:
    model = LMTPForCausalLM.from_backbone(
        base, leap_offsets=(2, 3, 4), **{"num_head_layers": 2, **settings}
    )
    generator = torch.Generator().manual_seed(6)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder, heads_only=True)
    return model.eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(12, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    tiny_base().save_pretrained(folder / "base")
    found: dict[str, Any] = {"folder": folder}
    for kind, settings in KINDS.items():
        found[kind] = save_heads(folder / "base", folder / kind, **settings)
    found["path"].save_pretrained(folder / "full")
    return found


def greedy(**settings: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": NEW_TOKENS, "detokenize": False, **settings}


def job(models: dict[str, Any], heads: str | None, calls: Any = None, **engine: Any) -> Any:
    speculation = {"model": str(models["folder"] / str(heads)), "num_speculative_tokens": 3}
    return {
        "engine": {
            "model": str(models["folder"] / "base"),
            "skip_tokenizer_init": True,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "block_size": 32,
            "speculative_config": speculation if heads else None,
            **engine,
        },
        "calls": calls or [[[ids, greedy()] for ids in prompts()]],
    }


def run(jobs: list[Any], folder: Path, *options: str) -> list[Any]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(ENGINE), "jobs.json", "results.json", *options]
    done = subprocess.run(
        command, cwd=folder, env=os.environ.copy(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def ids_of(call: Any) -> list[list[int]]:
    return [outputs[0]["ids"] for outputs in call]


def our_chain(model: LMTPForCausalLM, ids: list[int], depth: int = 3) -> tuple[list[int], int]:
    """Return the text and the number of backbone passes after the prefill."""
    input_ids = torch.tensor([ids])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_lmtp=True,
        draft_length=depth,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(ids) :].tolist(), len(output.acceptance_lengths[0])


@pytest.mark.parametrize("options", RUNNERS.values(), ids=RUNNERS.keys())
def test_texts_and_steps_are_those_of_our_chain(models, options, tmp_path):
    one_by_one = [[[ids, greedy()]] for ids in prompts()]
    chunked = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    jobs = {
        "path, one by one": job(models, "path", one_by_one),
        "path": job(models, "path"),
        "medusa": job(models, "medusa"),
        "path, chunked": job(models, "path", **chunked),
        # Twice the same: the second time from the cache, which holds one text and a half
        "path, cached and preempted": job(
            models,
            "path",
            [[[ids, greedy()] for ids in prompts()]] * 2,
            enable_prefix_caching=True,
            num_gpu_blocks_override=7,
        ),
        "grounded": job(models, "grounded"),
        "own": job(models, "own"),
        "low_rank": job(models, "low_rank"),
        "path of a full checkpoint": job(models, "full"),
    }
    if options:  # Triton's interpreter takes its time
        jobs = {name: jobs[name] for name in ("path", "medusa", "path, chunked")}
    results = dict(zip(jobs, run(list(jobs.values()), tmp_path, *options), strict=True))
    for name, result in results.items():
        model = models[name.partition(",")[0].partition(" ")[0]]
        texts, steps = zip(*(our_chain(model, ids) for ids in prompts()), strict=True)
        if name.endswith("one by one"):
            assert [ids_of(call)[0] for call in result["outputs"]] == list(texts), name
            assert result["steps"] == list(steps), name
            assert sum(steps) < len(prompts()) * (NEW_TOKENS - 1)  # some drafts are right
            continue
        for call, taken in zip(result["outputs"], result["steps"], strict=True):
            assert ids_of(call) == list(texts), name
            if "preempted" not in name:  # what is computed again is drafted for again
                assert taken == sum(steps), name


def distribution(base: LlamaForCausalLM, ids: list[int], temperature: float) -> torch.Tensor:
    """Return the probability of each second and third token after a prompt, `(V, V)`."""
    tokens = torch.arange(base.config.vocab_size)
    pairs = torch.cartesian_prod(tokens, tokens)
    texts = torch.cat([torch.tensor(ids).expand(len(pairs), -1), pairs], dim=1)
    with torch.no_grad():
        logits = base(texts, logits_to_keep=3).logits.double() / temperature
    first, second, third = logits.softmax(dim=-1).unbind(dim=1)
    before = first.gather(1, pairs[:, :1]) * second.gather(1, pairs[:, 1:])
    return (before * third).view(len(tokens), len(tokens), -1).sum(dim=0)


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; cells with an expected count below 5 are one."""
    rare = expected < 5
    pairs = [
        *zip(counts[~rare], expected[~rare], strict=True),
        (counts[rare].sum(), expected[rare].sum()),
    ]
    return float(sum((found - hoped) ** 2 / hoped for found, hoped in pairs)), len(pairs) - 1


def test_sampled_tokens_have_the_model_s_distribution(models, tmp_path):
    """In the second model runner: the first one samples wrongly on CPUs, with heads or without."""
    ids, count = prompts()[3], 256  # drafts are often right here
    sampling = {"temperature": 1.5, "max_tokens": 3, "detokenize": False}
    calls = [[[ids, {**sampling, "seed": seed}] for seed in range(count)]]
    settings = {"max_num_seqs": 64, "max_num_batched_tokens": 1024}
    [result] = run([job(models, "path", calls, **settings)], tmp_path, "--v2")
    [texts] = map(ids_of, result["outputs"])
    counts = torch.zeros(12, 12, dtype=torch.double)
    for _, second, third in texts:
        counts[second, third] += 1
    assert result["steps"][0] < 1.8 * count  # drafts are accepted
    base = LlamaForCausalLM.from_pretrained(models["folder"] / "base")
    statistic, freedom = chi_squared(counts, count * distribution(base, ids, 1.5))
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    wrong, freedom = chi_squared(counts, count * distribution(base, ids, 1.0))
    assert wrong > freedom + 8 * (2 * freedom) ** 0.5  # so many samples would show another one


def test_what_cannot_be_served_ends_with_the_reason(models, tmp_path):
    too_many = job(models, "path")
    too_many["engine"]["speculative_config"]["num_speculative_tokens"] = 4
    with pytest.raises(AssertionError, match=r"num_speculative_tokens=4.*at most 3"):
        run([too_many], tmp_path)
