"""What heads learn: tokens, the backbone's own distribution, or both, against a naive reference."""

import pytest
import torch
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.losses_lmtp import CHUNK_SIZE, leap_losses
from modeling_lmtp.training.objective import HeadObjective

VOCAB_SIZE, OFFSETS = 61, (2, 3, 5)
DRAFT_IDS = tuple(range(3, VOCAB_SIZE, 2))


def new_model(dtype=torch.float64, **options):
    backbone = tiny_llama(VOCAB_SIZE).to(dtype)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=OFFSETS, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.leap_heads.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(length=CHUNK_SIZE // 2 + 20):
    """Two rows, so that the targets make more than one chunk."""
    input_ids = torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[0, :9] = labels[1, 30:33] = -100
    return input_ids, labels


def naive(model, input_ids, labels, weight, temperature):
    """Each head's sums `(m, 5)` and loss `(m,)`, from whole logits, target by target."""
    ids = list(model.config.draft_token_ids or range(VOCAB_SIZE))
    outputs = model(input_ids, output_leap_logits=True)
    teacher = outputs.logits[..., ids].detach()
    losses, tallies = [], []
    for offset, logits in zip(OFFSETS, outputs.leap_logits, strict=True):
        hard = soft = torch.zeros((), dtype=torch.float64)
        correct = count = outside = 0
        for row, at in (labels != -100).nonzero().tolist():
            if at < offset:
                continue
            if labels[row, at] not in ids:
                outside += 1
                continue
            target, student = ids.index(labels[row, at]), logits[row, at - offset]
            q = (student / temperature).softmax(-1)
            p = (teacher[row, at - 1] / temperature).softmax(-1)
            hard = hard - student.softmax(-1)[target].log()
            soft = soft + temperature**2 * (p * (p / q).log()).sum()
            correct += int(student.argmax() == target)
            count += 1
        losses.append((1 - weight) * hard + weight * soft)
        tallies.append([hard.item(), soft.item(), correct, count, outside])
    return torch.stack(losses), torch.tensor(tallies)


@pytest.mark.parametrize("draft_ids", [None, DRAFT_IDS], ids=["all tokens", "draft vocabulary"])
@pytest.mark.parametrize(
    "heads",
    [{}, {"share_lm_head": False}, {"lm_head_rank": 2}, {"head_input": "weighted"}],
    ids=["shared", "own unembedding", "low-rank update", "all layers"],
)
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (1.0, 2.5), (0.0, 1.0)])
def test_losses_gradients_and_counts_are_those_of_a_naive_reference(
    weight, temperature, heads, draft_ids
):
    model = new_model(draft_token_ids=draft_ids, **heads)
    input_ids, labels = batch()
    objective = HeadObjective(len(OFFSETS), weight, temperature)
    loss = model(input_ids, labels=labels, num_items_in_batch=1, leap_objective=objective).loss
    expected, tallies = naive(model, input_ids, labels, weight, temperature)
    torch.testing.assert_close(loss, expected.sum())
    parameters = list(model.leap_heads.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected.sum(), parameters)
    )
    measured = objective.take_tally()
    if not weight:
        tallies[:, 1] = 0  # nothing is computed for it
    torch.testing.assert_close(measured, tallies)
    assert tallies[:, 3].min() > CHUNK_SIZE / 2
    assert objective.take_tally().count_nonzero() == 0


def test_without_distillation_it_is_the_plain_loss():
    model = new_model(torch.float32, head_context=2)
    input_ids, labels = batch()
    plain = model(input_ids, labels=labels, leap_objective=leap_losses)
    ours = model(input_ids, labels=labels, leap_objective=HeadObjective(len(OFFSETS)))
    assert torch.equal(plain.loss, ours.loss)
    assert torch.equal(plain.leap_losses, ours.leap_losses)


def test_heads_that_are_not_active_learn_nothing_and_cost_nothing():
    model = new_model(torch.float32)
    input_ids, labels = batch()
    run = []
    for index, head in enumerate(model.leap_heads):
        head.register_forward_hook(lambda *_args, index=index: run.append(index))
    objective = HeadObjective(len(OFFSETS))

    def middle_alone(*arguments):
        return objective(*arguments, active=(False, True, False))

    loss = model(input_ids, labels=labels, leap_objective=middle_alone).loss
    loss.backward()
    assert run == [1]
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "leap_heads.1." in name}
    assert objective.take_tally()[:, 3].tolist()[::2] == [0, 0]


def test_no_graph_reaches_the_backbone_and_its_distribution():
    model = new_model(torch.float32, share_lm_head=False)
    model.backbone.requires_grad_(True)  # even one that asks for gradients
    input_ids, labels = batch()
    objective = HeadObjective(len(OFFSETS), 0.5)
    model(input_ids, labels=labels, leap_objective=objective).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "leap_heads" in name}
