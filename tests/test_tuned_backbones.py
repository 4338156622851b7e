"""The comparison of tuned backbones: perplexity here, task accuracy where lm-evaluation-harness is."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.examples import Example

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tuned_backbones.py"


@pytest.fixture(scope="module")
def tuned_backbones():
    spec = importlib.util.spec_from_file_location("tuned_backbones", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_answers_tokens_count(tuned_backbones):
    model = tiny_llama(vocab_size=24)
    examples = [Example([3, 4, 5, 6, 7, 8], 2), Example([3, 9, 10], 1)]
    losses, counts = tuned_backbones.answer_losses(model, examples)
    assert counts.tolist() == [4, 2]
    for loss, example, start in zip(losses, examples, (2, 1), strict=True):
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, :start] = -100
        mean = model(ids, labels=labels).loss.item()
        assert loss.item() == pytest.approx(mean * (ids.shape[1] - start), rel=1e-5)


def test_models_are_compared_with_the_first_on_the_same_text(tuned_backbones):
    counts = torch.tensor([10.0, 30.0])
    losses = {"base": torch.tensor([20.0, 60.0]), "tuned": torch.tensor([15.0, 45.0])}
    found = tuned_backbones.perplexities(losses, counts)
    assert found["base"]["perplexity"] == pytest.approx(math.exp(2))
    assert found["tuned"]["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["base"]["log_ratio"] == 0
    assert found["tuned"]["log_ratio"] == pytest.approx(-0.5)
    # Every answer gains alike, so that the gain is sure although the answers differ
    assert found["tuned"]["log_ratio_standard_error"] == pytest.approx(0, abs=1e-6)
    right = {"base": torch.tensor([0.0, 1, 0, 1]), "tuned": torch.tensor([1.0, 1, 0, 1])}
    gained = tuned_backbones.accuracies(right)["tuned"]
    assert (gained["accuracy"], gained["gain"]) == (0.75, 0.25)
    assert gained["gain_standard_error"] == pytest.approx(0.25)


def test_folders_with_and_without_heads_are_measured_and_written_down(
    tuned_backbones, tmp_path, monkeypatch, capsys
):
    heads = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2,))
    for name, model in (("base", tiny_llama()), ("same", heads), ("other", tiny_llama(seed=1))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": "What is the sea?", "response": "The sea and the wind."}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [f"{name}={tmp_path / name}" for name in ("base", "same", "other")]
    options = ["--answers", tmp_path / "a.jsonl", "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["tuned_backbones.py", *models, *map(str, options)])
    tuned_backbones.main()
    record = json.loads((tmp_path / "out.json").read_text())
    found = record["perplexity"]
    assert found["same"]["perplexity"] == found["base"]["perplexity"]
    assert found["other"]["log_ratio"] != 0
    assert record["accuracy"] is None
    assert record["answers"] == 2
    assert "log_ratio" in capsys.readouterr().out


def test_bad_arguments_are_refused(tuned_backbones, monkeypatch):
    with pytest.raises(ValueError, match="NAME=FOLDER, got 'folder'"):
        tuned_backbones.read_models(["folder"])
    with pytest.raises(ValueError, match="'a' is given twice"):
        tuned_backbones.read_models(["a=x", "a=y"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match="pip install lm_eval"):
        tuned_backbones.right_answers(None, None, {}, 1, 1)


@pytest.mark.filterwarnings("ignore")
def test_the_last_number_of_an_answer_is_what_counts(tuned_backbones, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM

    texts = ["3 + 4 = 7. So 1,200.", "It is 18.0", "I do not know.", "5 is not 6"]
    golds = ["1200", "18", "5", "5"]

    class Answers(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return texts[: len(requests)]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    rows = [{"question": "How many?", "answer": f"Some. #### {gold}"} for gold in golds]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tuned_backbones.local_task(tmp_path / "q.jsonl", 16)
    found = lm_eval.simple_evaluate(model=Answers(), tasks=[task], bootstrap_iters=0)
    right = [sample[tuned_backbones.METRIC] for sample in found["samples"][tuned_backbones.TASK]]
    assert right == [1, 1, 0, 0]
