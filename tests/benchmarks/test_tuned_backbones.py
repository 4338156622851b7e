"""The comparison of tuned backbones: perplexity here, task accuracy where lm-evaluation-harness is."""

import json
import math
import sys

import pytest
import torch
from scripts import load_script
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.examples import Example


@pytest.fixture(scope="module")
def tuned_backbones():
    return load_script("tuned_backbones")


@pytest.fixture(scope="module")
def local_tasks():
    return load_script("local_tasks")


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
    assert record["accuracy"] == {}
    assert len(record["models"]["base"]["losses"]) == 2
    assert "log_ratio" in capsys.readouterr().out

    def load_again(*arguments):
        raise AssertionError("what is known is not measured again")

    monkeypatch.setattr(tuned_backbones, "load_backbone", load_again)
    tuned_backbones.main()
    assert json.loads((tmp_path / "out.json").read_text()) == record
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtype", "bfloat16"])
    with pytest.raises(SystemExit, match="other conditions"):
        tuned_backbones.main()
    tiny_llama(seed=2).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    with pytest.raises(SystemExit, match="'other' is another model"):
        tuned_backbones.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--num-answers", "1"])
    with pytest.raises(SystemExit, match="other conditions"):
        tuned_backbones.main()


def test_only_tuning_that_kept_answers_out_is_told(tuned_backbones):
    heads = {"accuracies": [[0.5, 0.1], [0.25, 0.1]], "chain_tokens_per_step": 1.5}
    told = {"drift": {"kl": 0.25}, "heads_before": heads, "heads_after": heads}
    untold = dict.fromkeys(told)
    models = {"base": None, "untold": {"held_out": untold}}
    record = {"models": {name: {"tuning": found} for name, found in models.items()}}
    assert tuned_backbones.heads_table(record) == ""
    record["models"]["told"] = {"tuning": {"held_out": told}}
    *_, row = tuned_backbones.heads_table(record).splitlines()
    assert row == "| told | 0.2500 | 0.50 0.25 | 0.50 0.25 | 1.50 | 1.50 |"


def test_bad_arguments_are_refused(tuned_backbones, monkeypatch):
    with pytest.raises(ValueError, match="NAME=FOLDER, got 'folder'"):
        tuned_backbones.read_models(["folder"])
    with pytest.raises(ValueError, match="'a' is given twice"):
        tuned_backbones.read_models(["a=x", "a=y"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match="pip install lm_eval"):
        tuned_backbones.right_answers(None, None, {}, 1, 1)


def test_code_is_run_only_where_that_was_said(tuned_backbones, tmp_path):
    options = ["base=x", "--answers", "a", "--output", str(tmp_path / "o"), "--functions", "f"]
    with pytest.raises(ValueError, match="--run-written-code"):
        tuned_backbones.measure(tuned_backbones.parse(options))
    assert tuned_backbones.tasks_of(tuned_backbones.parse([*options, "--run-written-code"]))


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("3 + 4 = 7. So 1,200.", "1200", True),
        ("It is 18.0", "18", True),
        ("I do not know.", "5", False),
        ("5 is not 6", "5", False),
        ("It fell to -3.", "-3", True),
    ],
)
def test_the_last_number_of_an_answer_is_what_counts(local_tasks, reply, gold, right):
    assert local_tasks.ends_in_its_number({"answer": f"So. #### {gold}"}, reply) is right


STUB = {
    "prompt": 'from math import pi\n\n\ndef area(r):\n    """Area of a circle."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(3) - 28.274) < 1e-3\n",
}


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Here it is:\n```python\ndef area(r):\n    return pi * r**2\n```\nDone.", True),
        ("```python\n    return pi * r * r\n```", True),  # the rest of the stub
        ("    return pi * r * r\n", True),  # no fence
        ("```python\ndef area(r):\n    return pi * r**2", True),  # cut before the fence closed
        ("```python\ndef area(r):\n    return 2 * pi * r\n```", False),
        ("```python\ndef area(r):\n    return pi *\n```", False),
        ("```python\ndef area(r):\n    return 0\nraise SystemExit\n```", False),  # before its tests
        ("", False),
    ],
)
def test_a_function_counts_if_its_tests_pass(local_tasks, reply, right):
    assert local_tasks.passes_its_tests(STUB, reply) is right


def test_a_function_that_does_not_end_is_stopped(local_tasks):
    reply = "```python\ndef area(r):\n    while True: pass\n```"
    assert not local_tasks.passes_its_tests(STUB, reply, seconds=0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["arithmetic", "functions"])
def test_the_harness_asks_and_scores_local_tasks(local_tasks, tmp_path, name):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM

    texts = ["It is 7. ```python\n    return pi * r * r\n```\n7", "No."]
    rows = [STUB | {"question": "How many?", "answer": "Some. #### 7"}] * 2
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    class Answers(LM):
        def generate_until(self, requests, disable_tqdm=False):
            asked.extend(request.args[0] for request in requests)
            return texts[: len(requests)]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    task = getattr(local_tasks, name)(tmp_path / "q.jsonl", 16)
    found = lm_eval.simple_evaluate(model=Answers(), tasks=[task], bootstrap_iters=0)
    right = [sample[local_tasks.SCORE] for sample in found["samples"][task["task"]]]
    assert right == [1, 0]
    question = STUB["prompt"].strip()
    wanted = f"Complete this Python function:\n```python\n{question}\n```"
    assert asked[0] == ("How many?" if name == "arithmetic" else wanted)
