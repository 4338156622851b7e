"""What a training run says of itself."""

import json
import sys

import pytest
import torch
from tiny_training import examples, new_model, settings, warm_up

from modeling_lmtp.training import training_log
from modeling_lmtp.training.evaluation import evaluate_heads
from modeling_lmtp.training.training_log import save_training_log

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def run(folder, held_out=4, **changes):
    model = new_model()
    report = warm_up(model, examples(), examples(held_out, 1), folder, settings(**changes))
    return model, report


def test_each_head_s_loss_and_accuracy_are_means_over_the_targets_since_the_last_entry(tmp_path):
    untrained = new_model()
    _, report = run(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=24,
        logging_steps=1,
        learning_rate=1e-9,
    )
    [entry] = [entry for entry in report.state.log_history if "loss" in entry]
    tokens = torch.tensor([example.input_ids for example in examples()])
    for head, offset in enumerate((2, 3)):
        logits = untrained.leap_logits(head, states_of(untrained, tokens))[:, :-offset]
        # An answer starts at 2, so every target that a state exists for is of the answer
        targets = tokens[:, offset:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert entry[f"loss_head_{offset}"] == pytest.approx(loss.item(), rel=1e-5)
        top1 = (logits.argmax(-1) == targets).float().mean().item()
        assert entry[f"top1_head_{offset}"] == pytest.approx(top1)
    assert not any(name.startswith("divergence") for name in entry)


def states_of(model, tokens):
    with torch.no_grad():
        return model.backbone.model(tokens).last_hidden_state


def test_targets_outside_the_draft_vocabulary_are_logged_as_misses(tmp_path):
    model, draft_ids = new_model(draft_token_ids=tuple(range(3, 33))), set(range(3, 33))
    once = settings(num_train_epochs=1, per_device_train_batch_size=24, logging_steps=1)
    entry = warm_up(model, examples(), [], tmp_path, once).state.log_history[0]
    whole = new_model(draft_token_ids=tuple(range(3, 33)))
    tokens = torch.tensor([example.input_ids for example in examples()])
    for head, offset in enumerate((2, 3)):
        drafted = whole.leap_logits(head, states_of(whole, tokens))[:, :-offset].argmax(-1) + 3
        targets = tokens[:, offset:]
        hits = (drafted == targets).float().mean().item()
        inside = sum(int(token) in draft_ids for token in targets.flatten()) / targets.numel()
        assert entry[f"top1_head_{offset}"] == pytest.approx(hits)
        assert entry[f"coverage_head_{offset}"] == pytest.approx(inside)


def test_the_backbone_s_distribution_is_logged_where_it_is_learned(tmp_path):
    _, report = run(tmp_path, num_train_epochs=1, distillation_weight=0.5, logging_steps=1)
    first, *_, last = [entry for entry in report.state.log_history if "loss" in entry]
    assert first["divergence_head_2"] > 0
    assert last["loss"] > 0


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [({}, [6, 12]), ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 12])],
    ids=["epochs", "every 4 steps"],
)
def test_held_out_answers_are_evaluated_after_each_epoch_and_as_often_as_asked(
    tmp_path, strategy, steps
):
    model, report = run(tmp_path, **strategy)
    held_out = [entry for entry in report.state.log_history if "eval_tokens_per_step" in entry]
    assert [entry["step"] for entry in held_out] == steps
    final, _ = evaluate_heads(model, examples(4, 1))
    assert held_out[-1]["eval_tokens_per_step"] == final.chain_tokens_per_step
    for distance, ranks in enumerate(final.accuracies, start=1):
        assert held_out[-1][f"eval_top1_distance_{distance}"] == ranks[0]
    # Saved with the checkpoint of the same step, so a run that goes on has it
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert held_out[-1] in state["log_history"]


def test_evaluation_changes_nothing_in_training(tmp_path):
    without, _ = run(tmp_path / "without", held_out=0)
    often, _ = run(tmp_path / "often", eval_strategy="steps", eval_steps=1)
    torch.testing.assert_close(
        often.leap_heads.state_dict(), without.leap_heads.state_dict(), rtol=0, atol=0
    )


def test_the_log_is_saved_with_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    _, report = run(tmp_path)
    save_training_log(tmp_path, report.state.log_history, (2, 3))
    saved = json.loads((tmp_path / "training_log.json").read_text())
    assert saved == {"leap_offsets": [2, 3], "log": report.state.log_history}
    assert (tmp_path / "training_log.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_log_is_saved_alone_and_that_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(training_log.logger, "warning_once", said.append)
    save_training_log(tmp_path, [{"step": 1, "loss": 2.0}], (2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["training_log.json"]
    assert "install modeling-lmtp[plots]" in said[0]
