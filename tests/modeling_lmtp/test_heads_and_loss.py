"""Leap heads at their start, and their loss against a reference written out token by token."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.losses_lmtp import CHUNK_SIZE, leap_positions, sum_of_means, token_cross_entropy
from modeling_lmtp.unembeddings_lmtp import logit_scale

VOCAB_SIZE = 61  # no other axis of these models has this size
SCHEDULES = [(3, 5, 7), (2, 3, 4), (2, 3, 5)]


def wrapped(
    offsets: tuple[int, ...] = (3, 5, 7), *, random_heads: bool = True, **settings
) -> LMTPForCausalLM:
    model = LMTPForCausalLM.from_backbone(tiny_llama(VOCAB_SIZE), leap_offsets=offsets, **settings)
    if random_heads:
        generator = torch.Generator().manual_seed(7)
        for parameter in model.leap_heads.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of tokens, and labels in which some of them do not count."""
    input_ids = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[0, 5] = labels[1, :4] = labels[1, -1] = -100
    return input_ids, labels


def naive_losses(
    model: LMTPForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor
) -> list[tuple[torch.Tensor, int]]:
    """Sum and number of the token losses of the LM head (offset 1) and of each leap head."""
    states = model.backbone.model(input_ids).last_hidden_state
    heads = [(1, None), *zip(model.config.leap_offsets, model.leap_heads, strict=True)]
    losses = []
    for offset, head in heads:
        total, count = torch.zeros(()), 0
        for row in range(input_ids.shape[0]):
            for s in range(input_ids.shape[1] - offset):
                target = labels[row, s + offset]
                if target == -100:
                    continue
                z, unembedding = states[row, s], model.backbone.lm_head.weight
                if head is not None:
                    for block in head.blocks:
                        y = block.linear.weight @ z + block.linear.bias
                        z = z + y * torch.sigmoid(y)
                    if head.lm_head is not None:
                        unembedding = head.lm_head.weight
                logits = unembedding @ z
                total = total + logits.exp().sum().log() - logits[target]
                count += 1
        losses.append((total, count))
    return losses


def gradients(loss: torch.Tensor, model: LMTPForCausalLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_loss_and_gradients(
    model: LMTPForCausalLM, actual: torch.Tensor, expected: torch.Tensor
) -> None:
    torch.testing.assert_close(actual, expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    actual_gradients = gradients(actual, model)
    assert set(actual_gradients) == trained
    torch.testing.assert_close(actual_gradients, gradients(expected, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_head_layers", [1, 2])
@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
def test_leap_heads_start_as_the_language_modeling_head(share_lm_head, num_head_layers):
    model = wrapped(
        random_heads=False, share_lm_head=share_lm_head, num_head_layers=num_head_layers
    )
    outputs = model(batch()[0], output_leap_logits=True)
    assert len(outputs.leap_logits) == 3
    assert all(torch.equal(logits, outputs.logits) for logits in outputs.leap_logits)


@pytest.mark.parametrize("num_head_layers", [1, 2])
@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
def test_every_block_and_unembedding_has_weights_of_its_own(share_lm_head, num_head_layers):
    model = wrapped(share_lm_head=share_lm_head, num_head_layers=num_head_layers)
    per_head = 2 * num_head_layers + (not share_lm_head)
    assert len(list(model.leap_heads.parameters())) == 3 * per_head
    storages = Counter(parameter.data_ptr() for parameter in model.parameters())
    assert max(storages.values()) == 1


@pytest.mark.parametrize("num_head_layers", [1, 2])
@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("offsets", SCHEDULES, ids=str)
def test_stage_1_sums_the_head_losses(offsets, share_lm_head, num_head_layers):
    model = wrapped(offsets, share_lm_head=share_lm_head, num_head_layers=num_head_layers)
    input_ids, labels = batch()
    outputs = model(input_ids, labels=labels)
    _, *leaps = naive_losses(model, input_ids, labels)
    means = [total / count for total, count in leaps]
    torch.testing.assert_close(outputs.leap_losses, torch.stack(means).detach())
    assert not outputs.leap_losses.requires_grad
    assert_same_loss_and_gradients(model, outputs.loss, sum(means))


@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("offsets", SCHEDULES, ids=str)
def test_stage_2_adds_beta_times_the_head_losses_to_the_backbone_s(offsets, share_lm_head):
    model = wrapped(
        offsets, share_lm_head=share_lm_head, train_backbone=True, leap_loss_weight=0.25
    )
    input_ids, labels = batch()
    next_token, *leaps = (total / count for total, count in naive_losses(model, input_ids, labels))
    actual = model(input_ids, labels=labels).loss
    assert_same_loss_and_gradients(model, actual, next_token + 0.25 * sum(leaps))


@pytest.mark.parametrize("num_items", [40, torch.tensor(40)], ids=["int", "tensor"])
@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
def test_num_items_in_batch_divides_every_sum_of_token_losses(train_backbone, num_items):
    model = wrapped(train_backbone=train_backbone, leap_loss_weight=0.5)
    input_ids, labels = batch()
    next_token, *leaps = (total / 40 for total, _ in naive_losses(model, input_ids, labels))
    expected = next_token + 0.5 * sum(leaps) if train_backbone else sum(leaps)
    actual = model(input_ids, labels=labels, num_items_in_batch=num_items).loss
    assert_same_loss_and_gradients(model, actual, expected)


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("num_heads", [0, 3])
def test_labels_that_are_all_ignored_give_no_loss_and_no_gradient(num_heads, train_backbone):
    offsets = (3, 5, 7)[:num_heads]
    model = wrapped(offsets, train_backbone=train_backbone)
    input_ids, _ = batch()
    loss = model(input_ids, labels=torch.full_like(input_ids, -100)).loss
    assert loss.item() == 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    all_gradients = gradients(loss, model)
    assert set(all_gradients) == set(trained)
    assert all(gradient.count_nonzero() == 0 for gradient in all_gradients.values())


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_heads_whose_targets_lie_behind_the_end_have_no_loss(length, train_backbone):
    model = wrapped((2, 3, 5), train_backbone=train_backbone, leap_loss_weight=1.0)
    input_ids = batch()[0][:, :length]
    next_token, *leaps = (
        total / max(count, 1) for total, count in naive_losses(model, input_ids, input_ids)
    )
    outputs = model(input_ids, labels=input_ids)
    expected = sum(leaps) + (next_token if train_backbone else 0)
    torch.testing.assert_close(outputs.loss, expected)
    assert (outputs.leap_losses == 0).tolist() == [length <= offset for offset in (2, 3, 5)]
    assert all(g.isfinite().all() for g in gradients(outputs.loss, model).values())


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
def test_without_leap_heads_the_loss_is_the_backbone_s(train_backbone):
    model = wrapped((), train_backbone=train_backbone)
    input_ids, labels = batch()
    outputs = model(input_ids, labels=labels)
    expected = model.backbone(input_ids, labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert outputs.leap_losses is None
    assert_same_loss_and_gradients(model, outputs.loss, expected.loss)


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 1000])
def test_chunks_of_any_size_give_the_same_loss_and_gradients(chunk_size):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(30, 8, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB_SIZE, (30,), generator=generator)
    unembedding = torch.nn.Linear(8, VOCAB_SIZE)
    inputs = [states, unembedding.weight, unembedding.bias]
    losses = [token_cross_entropy(unembedding, states, targets)]
    actual, _ = sum_of_means(losses, chunk_size=chunk_size)
    expected = -unembedding(states).log_softmax(-1)[range(30), targets].mean()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, inputs), torch.autograd.grad(3 * expected, inputs)
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
def test_the_loss_can_be_evaluated_without_gradients(train_backbone, share_lm_head, mode):
    model = wrapped(share_lm_head=share_lm_head, train_backbone=train_backbone)
    input_ids, labels = batch()
    expected = model(input_ids, labels=labels).loss
    with mode():
        actual = model(input_ids, labels=labels).loss
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach())


def test_targets_are_the_labels_at_the_offset_that_count():
    labels = torch.tensor([[0, 1, 2, -100, 4], [5, -100, -100, 8, 9]])
    rows, positions = leap_positions(labels, offset=2)
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == [
        (0, 0),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    assert labels[rows, positions + 2].tolist() == [2, 4, 8, 9]


def test_stage_1_freezes_the_backbone_and_runs_it_without_a_graph():
    model = wrapped()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    # Even a backbone that asks for gradients gets none
    model.backbone.model.requires_grad_(True)
    in_graph = []
    for module in model.backbone.model.modules():
        module.register_forward_hook(
            lambda _module, _args, output: in_graph.extend(
                tensor.requires_grad for tensor in [output] if isinstance(tensor, torch.Tensor)
            )
        )
    input_ids, labels = batch()
    loss = model(input_ids, labels=labels).loss
    assert len(in_graph) > 10
    assert not any(in_graph)
    assert all(name.startswith("leap_heads.") for name in gradients(loss, model))


@pytest.mark.parametrize("train_backbone", [False, True], ids=["stage 1", "stage 2"])
def test_dropout_of_the_backbone_is_off_while_it_is_frozen(train_backbone):
    backbone = tiny_llama(VOCAB_SIZE, attention_dropout=0.5)
    model = LMTPForCausalLM.from_backbone(
        backbone, leap_offsets=(2, 3), train_backbone=train_backbone
    )
    input_ids, labels = batch()
    evaluated = model(input_ids=input_ids, labels=labels).leap_losses
    model.train()
    assert model.leap_heads.training
    losses = model(input_ids=input_ids, labels=labels).leap_losses
    assert torch.equal(losses, evaluated) is not train_backbone


def test_stage_2_trains_the_backbone():
    model = wrapped(train_backbone=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Kept:
    """Stands for a tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def logits_kept_for_backward(model: LMTPForCausalLM, length: int) -> int:
    """How many tensors of the size of logits a loss holds when the forward pass is over."""
    input_ids = torch.arange(length)[None] % VOCAB_SIZE
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        holder = Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
    assert len(kept) > 0
    num_logits = sum(holder.tensor.numel() >= CHUNK_SIZE * VOCAB_SIZE for holder in kept)
    del loss
    return num_logits


@pytest.mark.parametrize("share_lm_head", [True, False], ids=["shared", "own"])
def test_stage_1_keeps_no_logits_for_backward(share_lm_head):
    model = wrapped((3, 5), share_lm_head=share_lm_head)
    length = CHUNK_SIZE + 50  # too short for any other tensor of that size
    assert 32 * length < CHUNK_SIZE * VOCAB_SIZE
    assert logits_kept_for_backward(model, length) == 0


def test_stage_2_keeps_no_more_logits_for_backward_than_plain_training():
    leaping, plain = wrapped((3, 5, 7), train_backbone=True), wrapped((), train_backbone=True)
    length = CHUNK_SIZE + 50
    assert logits_kept_for_backward(leaping, length) == logits_kept_for_backward(plain, length) > 0


def test_stage_1_computes_one_chunk_of_logits_at_a_time():
    model = wrapped()
    logit_scale(model.backbone)  # found out once, with a pass of its own
    num_logits = []
    model.backbone.lm_head.register_forward_hook(
        lambda _module, _args, output: num_logits.append(output.numel() // VOCAB_SIZE)
    )
    input_ids = torch.arange(2 * CHUNK_SIZE + 50)[None] % VOCAB_SIZE
    model(input_ids, labels=input_ids).loss.backward()
    assert max(num_logits) == CHUNK_SIZE
    # One for the backbone, whose own are not wanted; then those of 3 heads, each once
    targets = sum(input_ids.shape[1] - offset for offset in (3, 5, 7))
    assert sum(num_logits) == 1 + targets


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_predictions_of_a_trainer_are_logits_alone(tmp_path):
    rows = [{"input_ids": (ids := torch.arange(3, 27) + n), "labels": ids} for n in range(5)]
    model = LMTPForCausalLM.from_backbone(tiny_llama(96), leap_offsets=(2, 3), train_backbone=True)
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    found = Trainer(model, arguments).predict(rows).predictions
    assert found.shape == (5, 24, 96)
