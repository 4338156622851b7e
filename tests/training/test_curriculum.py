"""Heads that join one after another."""

import pytest
import torch
from tiny_training import examples, new_model, settings, warm_up

from modeling_lmtp.training.curriculum import active_heads

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def joined_at(curriculum, share, num_steps=12, num_heads=3):
    """The step at which each head joins."""
    steps = [active_heads(curriculum, num_heads, s, num_steps, share) for s in range(num_steps)]
    return [[row[head] for row in steps].index(True) for head in range(num_heads)]


@pytest.mark.parametrize(
    ("curriculum", "share", "expected"),
    [
        ("none", 0.5, [0, 0, 0]),
        ("forward", 0.5, [0, 2, 4]),
        ("reverse", 0.5, [4, 2, 0]),
        ("forward", 1.0, [0, 4, 8]),
    ],
)
def test_heads_join_in_turn_and_stay(curriculum, share, expected):
    assert joined_at(curriculum, share) == expected
    assert all(active_heads(curriculum, 3, 11, 12, share))


@pytest.mark.parametrize(("curriculum", "late"), [("forward", 1), ("reverse", 0)])
def test_a_head_stays_as_it_is_until_it_joins(tmp_path, curriculum, late):
    """Of 12 steps the second head joins at the sixth, whose learning rate is still to come."""
    model = new_model()
    report = warm_up(
        model,
        examples(),
        [],
        tmp_path,
        settings(
            curriculum=curriculum,
            curriculum_share=1.0,
            logging_steps=1,
            per_device_train_batch_size=4,
        ),
    )
    late_offset, early_offset = (2, 3)[late], (3, 2)[late]
    losses = [entry for entry in report.state.log_history if "loss" in entry]
    assert [f"loss_head_{late_offset}" in entry for entry in losses] == [False] * 6 + [True] * 6
    assert all(f"loss_head_{early_offset}" in entry for entry in losses)
    steps = {
        name: state["step"].item()
        for name, state in torch.load(tmp_path / "checkpoint-12" / "optimizer.pt")["state"].items()
    }
    assert sorted(steps.values()) == [6, 6, 12, 12]  # a weight and a bias of each head
