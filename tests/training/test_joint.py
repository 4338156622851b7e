"""Joint tuning: what is learned, how fast, and how far the backbone may drift."""

import json
import math

import pytest
import torch
from joint_runs import OFFSETS, examples, joint_tune, naive_sums, new_model, settings
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from modeling_lmtp.training import drift
from modeling_lmtp.training.arguments import JointTrainingArguments
from modeling_lmtp.training.drift import measure_drift, next_token_kl, original_model
from modeling_lmtp.training.joint_trainer import JointTrainer
from modeling_lmtp.unembeddings_lmtp import logit_scale

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT asks
    # Trainer resumes with torch.load of its own files, optimizer state among them
    pytest.mark.filterwarnings("ignore:.*torch.load.*:FutureWarning"),
]


# Transformers has renamed it, and warns of the older name
RECOMPUTE = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in JointTrainingArguments.__dataclass_fields__
)


def tune(folder, model=None, answers=None, held_out=(), **changes):
    trainer = joint_tune(
        model if model is not None else new_model(),
        answers or examples(),
        held_out,
        folder,
        settings(**changes),
    )
    return trainer.model, trainer


def logged(report, name="loss"):
    return [entry[name] for entry in report.state.log_history if name in entry]


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_is_ntp_and_weighted_heads(tmp_path, beta, accumulation):
    sums = [naive_sums(new_model(), example) for example in examples()]
    count = sum(tokens for _, _, tokens in sums)
    ntp = sum(loss for loss, _, _ in sums) / count
    heads = [sum(losses[i] for _, losses, _ in sums) / count for i in range(len(OFFSETS))]
    _, report = tune(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=24 // accumulation,
        gradient_accumulation_steps=accumulation,
        leap_loss_weight=beta,
    )
    [loss] = logged(report)
    assert loss == pytest.approx(ntp + beta * sum(heads), rel=1e-5)
    if accumulation == 1:  # otherwise means of means
        found = [logged(report, name)[0] for name in ("loss_ntp", "loss_head_2", "loss_head_3")]
        assert found == pytest.approx([ntp, *heads], rel=1e-5)


def test_the_logged_parts_add_up_to_the_loss(tmp_path):
    _, report = tune(tmp_path, kl_weight=0.5, leap_loss_weight=0.2, num_train_epochs=1)
    names = ("loss_ntp", "loss_head_2", "loss_head_3", "kl")
    for ntp, first, second, kl, loss in zip(
        *(logged(report, name) for name in names), logged(report), strict=True
    ):
        assert loss == pytest.approx(ntp + 0.2 * (first + second) + 0.5 * kl, rel=1e-5)
    assert logged(report, "kl")[0] == 0
    assert logged(report, "kl")[-1] > 0


@pytest.mark.parametrize("rates", [(1e-3, 1e-2), (1e-2, 1e-3), (1e-3, None)], ids=str)
def test_backbone_and_heads_have_their_own_learning_rates(tmp_path, rates):
    rate, head_rate = rates
    tuned, _ = tune(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=24,
        learning_rate=rate,
        head_learning_rate=head_rate,
        warmup_steps=0,
    )
    # B starts at 0, and a first step of Adam is the learning rate wherever there is a gradient
    steps = {True: [], False: []}
    for name, tensor in get_peft_model_state_dict(tuned).items():
        if "lora_B" in name:
            steps["leap_heads" in name].append(tensor.abs().max().item())
    assert steps[False] == pytest.approx([rate] * len(steps[False]), rel=1e-3)
    assert steps[True] == pytest.approx([head_rate or rate] * len(OFFSETS), rel=1e-3)


def test_the_kl_and_its_gradient_equal_a_naive_reference(monkeypatch):
    monkeypatch.setattr(drift, "CHUNK_SIZE", 5)
    generator = torch.Generator().manual_seed(3)
    original, tuned = torch.randn(2, 3, 9, 16, generator=generator)
    labels = torch.randint(0, 16, (3, 9), generator=generator)
    labels[0, :4] = labels[2, 6:] = -100
    tuned.requires_grad_()
    total, count = next_token_kl(original, tuned, labels)
    total.backward()
    gradient, tuned.grad = tuned.grad, None
    naive = torch.zeros(())
    for row in range(3):
        for position in range(8):
            if labels[row, position + 1] != -100:
                p, q = original[row, position].softmax(0), tuned[row, position].softmax(0)
                naive = naive + (p * (p.log() - q.log())).sum()
    naive.backward()
    assert count == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(total, naive)
    torch.testing.assert_close(gradient, tuned.grad)


def test_the_kl_keeps_the_backbone_near_the_original(tmp_path):
    held_out = examples(4, 1)
    free, held = (
        tune(tmp_path / str(weight), held_out=held_out, kl_weight=weight)[1].drift_report(held_out)
        for weight in (0.0, 20.0)
    )
    assert held.kl < free.kl / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_drift_report_compares_with_the_original(tmp_path, dtype):
    held_out = examples(5, 1)
    tuned, report = tune(tmp_path, new_model(dtype), held_out=held_out)
    kl, nlls, agreeing, count = 0.0, [0.0, 0.0], 0, 0
    for example in held_out:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0].float() for model in (new_model(dtype), tuned)]
        for target in range(example.answer_start, len(example.input_ids)):
            p, q = (each[target - 1].softmax(0) for each in logits)
            kl += float((p * (p.log() - q.log())).sum())
            nlls = [
                nll - float(x[ids[0, target]].log()) for nll, x in zip(nlls, (p, q), strict=True)
            ]
            agreeing += int(p.argmax() == q.argmax())
            count += 1
    found = report.drift_report(held_out)
    assert found.tokens == count
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.perplexity_original == pytest.approx(math.exp(nlls[0] / count), rel=1e-4)
    assert found.perplexity_tuned == pytest.approx(math.exp(nlls[1] / count), rel=1e-4)
    assert found.top1_agreement == agreeing / count
    assert found.kl > 1e-3


def test_before_any_step_there_is_no_drift(tmp_path):
    answers = examples(4, 1)
    tuned, _ = tune(tmp_path, learning_rate=1e-30, num_train_epochs=1)
    found = measure_drift(tuned, answers)
    assert (found.kl, found.top1_agreement) == (0, 1)
    assert found.perplexity_original == found.perplexity_tuned
    with pytest.raises(ValueError, match="examples must hold at least one answer"):
        measure_drift(tuned, [])


def test_original_model_restores_the_adapters_after_the_block(tmp_path):
    tuned, _ = tune(tmp_path)
    ids = torch.tensor([examples(1)[0].input_ids])
    tuned.train()
    with original_model(tuned):
        inside = tuned(input_ids=ids).logits
        assert not inside.requires_grad
    assert tuned.training
    torch.testing.assert_close(inside, new_model()(input_ids=ids).logits, rtol=0, atol=0)
    after = tuned(input_ids=ids).logits
    assert after.requires_grad
    assert not torch.allclose(after, inside, atol=1e-3)


@pytest.mark.parametrize("heads", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_learn_and_the_weights_below_the_adapters_stay_frozen(tmp_path, heads, dtype):
    before = new_model(dtype).state_dict()
    tuned, report = tune(
        tmp_path, new_model(dtype), held_out=examples(4, 1), head_training=heads, num_train_epochs=3
    )
    for name in ("loss_ntp", "loss_head_2", "loss_head_3"):
        losses = logged(report, name)
        assert sum(losses[-3:]) < sum(losses[:3])
    assert len(logged(report, "eval_kl")) == len(logged(report, "eval_top1_distance_1")) == 3
    assert tuned(input_ids=torch.tensor([[3, 4, 5]])).logits.dtype is dtype
    with original_model(tuned):
        base = tuned.unload().state_dict()
    assert base.keys() == before.keys()
    changed = {name for name in before if not torch.equal(base[name], before[name])}
    assert changed == ({n for n in before if "leap_heads" in n} if heads == "full" else set())
    assert {tensor.dtype for tensor in base.values()} == {dtype}


def test_weight_zero_freezes_the_heads(tmp_path):
    tuned, report = tune(tmp_path, leap_loss_weight=0.0, head_training="full")
    assert not any("leap_heads" in name for name in get_peft_model_state_dict(tuned))
    assert logged(report) == pytest.approx(logged(report, "loss_ntp"), rel=1e-5)


def test_a_model_without_heads_is_the_ntp_baseline(tmp_path):
    model = new_model(leap_offsets=())
    _, report = tune(tmp_path, model, held_out=examples(2, 1))
    assert logged(report) == pytest.approx(logged(report, "loss_ntp"), rel=1e-5)
    assert logged(report, "eval_kl")
    assert report.head_report(examples(2, 1)) is None


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses, passes = [], []
    for recompute in (False, True):
        calls, model = [], new_model()
        logit_scale(model.backbone)  # found out once per model, with a pass of its own
        model.backbone.model.layers[0].self_attn.register_forward_hook(
            lambda *_, c=calls: c.append(1)
        )
        options = {RECOMPUTE: recompute, "num_train_epochs": 1}
        losses.append(logged(tune(tmp_path / str(recompute), model, **options)[1]))
        passes.append(len(calls))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert passes == [3, 6]


class KilledError(Exception):
    pass


class Watch(TrainerCallback):
    """Notes each step, and kills the run at one of them."""

    def __init__(self, last=None):
        self.last = last
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        if state.global_step == self.last:
            raise KilledError


@pytest.mark.parametrize("heads", ["lora", "full"])
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch, heads):
    options = {"head_training": heads, "kl_weight": 0.1, "lora_dropout": 0.1, "save_steps": 2}
    whole, _ = tune(tmp_path / "whole", **options)
    original = JointTrainer.__init__

    def watch(callback):
        def with_callback(self, *args, **kwargs):
            original(self, *args, callbacks=[callback], **kwargs)

        monkeypatch.setattr(JointTrainer, "__init__", with_callback)
        return callback

    watch(Watch(last=5))  # in the second epoch, after the checkpoint of step 4
    with pytest.raises(KilledError):
        tune(tmp_path / "stopped", **options)
    watched = watch(Watch())
    resumed, report = tune(tmp_path / "stopped", **options)
    assert watched.steps == [5, 6]
    assert [entry["step"] for entry in report.state.log_history if "loss" in entry] == list(
        range(1, 7)
    )
    expected = get_peft_model_state_dict(whole)
    found = get_peft_model_state_dict(resumed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_the_folder_of_another_run_is_refused_and_unchanged(tmp_path):
    tune(tmp_path, num_train_epochs=1)
    record = (tmp_path / "run.json").read_text()
    with pytest.raises(ValueError, match="another kl_weight"):
        tune(tmp_path, num_train_epochs=1, kl_weight=0.5)
    with pytest.raises(ValueError, match="another examples_sha256"):
        tune(tmp_path, answers=examples(seed=5), num_train_epochs=1)
    with pytest.raises(ValueError, match="another bf16, checkpoint"):
        tune(tmp_path, new_model(torch.bfloat16), num_train_epochs=1)
    assert (tmp_path / "run.json").read_text() == record
    assert json.loads(record)["leap_offsets"] == list(OFFSETS)


def test_a_model_with_adapters_is_refused(tmp_path):
    tuned, _ = tune(tmp_path / "first", num_train_epochs=1)
    for model in (tuned, tuned.get_base_model()):
        with pytest.raises(ValueError, match="has adapters already"):
            tune(tmp_path / "second", model)
    assert not (tmp_path / "second").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.leap_heads[0].blocks[0].linear.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="The loss is nan at step 1"):
        tune(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0, got 0"),
        ({"lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({"head_learning_rate": 0.0}, "head_learning_rate must be more than 0, got 0"),
        ({"leap_loss_weight": -0.1}, "leap_loss_weight must be at least 0, got -0.1"),
        ({"kl_weight": float("nan")}, "kl_weight must be at least 0, got nan"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1, got 1.0"),
        ({"head_training": "none"}, "head_training must be one of lora, full; got 'none'"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        JointTrainingArguments(**change)


def test_the_defaults_are_those_of_the_paper():
    found = JointTrainingArguments()
    assert (found.lora_r, found.lora_alpha, found.head_training) == (32, 16, "lora")
    assert (found.leap_loss_weight, found.learning_rate, found.num_train_epochs) == (0.1, 1e-5, 3)
