"""States kept on disk: warm-up with them gives the weights that it gives without."""

import pytest
import torch
from tiny import tiny_llama
from tiny_training import examples, new_model, settings, warm_up

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.examples import AnswerDataset, Example, collate
from modeling_lmtp.training.packing import PackedDataset, collate_packs
from modeling_lmtp.training.state_cache import StateCache
from modeling_lmtp.unembeddings_lmtp import logit_scale

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def passes_of(backbone):
    """Count the backbone's passes."""
    passes = []
    backbone.register_forward_hook(lambda *args: passes.append(None))
    return passes


def answers():
    return [Example(row.input_ids[: 8 + i % 9], 2) for i, row in enumerate(examples(11))]


@pytest.mark.parametrize("head_input", ["last", "weighted"])
def test_cached_states_equal_those_of_each_answer_alone(tmp_path, head_input):
    model = new_model(head_input=head_input).eval()
    cache = StateCache(tmp_path, model)
    cache.fill(answers())
    for example in answers():
        with model.head_states() as states:
            model.backbone(input_ids=torch.tensor([example.input_ids]))
        torch.testing.assert_close(cache.load(example), states[0][0])


@pytest.mark.parametrize(
    ("heads", "changes"),
    [
        ({}, {}),
        ({"head_context": "path"}, {"distillation_weight": 0.5}),
        ({"head_input": "weighted"}, {}),
        ({"head_context": 1}, {"packing": True, "max_length": 40}),
    ],
    ids=["paper", "path, soft", "weighted", "packed"],
)
def test_a_run_with_cached_states_ends_with_the_same_weights(tmp_path, heads, changes):
    trained = []
    for name, folder in (("without", None), ("with", tmp_path / "states")):
        model = new_model(**heads)
        warm_up(
            model,
            examples(22),  # the last batch is filled up
            [],
            tmp_path / name,
            settings(**changes, state_folder=folder and str(folder)),
        )
        trained.append(model.leap_heads.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_backbone_reads_each_answer_once_for_all_runs(tmp_path):
    passes = []
    for run, count in enumerate((16, 16, 24)):
        model = new_model(leap_offsets=(2 + run,))
        logit_scale(model.backbone)  # found out once per model, with a pass of its own
        counted = passes_of(model.backbone)
        chosen = settings(num_train_epochs=3, state_folder=str(tmp_path / "s"))
        folder = tmp_path / str(run)
        warm_up(model, examples(count), [], folder, chosen)
        passes.append(len(counted))
    assert passes == [1, 0, 1], "all answers of a run fit in one batch here"


def test_a_stopped_fill_resumes_and_leaves_no_partial_file(tmp_path, monkeypatch):
    model, rows = new_model(), answers()
    monkeypatch.setattr("modeling_lmtp.training.state_cache.TOKENS_PER_BATCH", 32)
    cache = StateCache(tmp_path, model)
    monkeypatch.setattr(
        "modeling_lmtp.training.state_cache.save_file", failing_after(cache, 5), raising=True
    )
    with pytest.raises(OSError, match="No space left"):
        cache.fill(rows)
    monkeypatch.undo()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    assert not list(tmp_path.rglob("*.unfinished"))
    counted = passes_of(model.backbone)
    StateCache(tmp_path, model).fill(rows)
    assert len(counted) == 1, "what is missing fits in one batch"
    assert all(len(cache.load(row)) == len(row.input_ids) for row in rows)


def failing_after(cache, count):
    from safetensors.torch import save_file

    saved = []

    def save(tensors, path):
        path.write_bytes(b"half")
        if len(saved) == count:
            raise OSError("No space left on device")
        saved.append(path)
        save_file(tensors, path)

    return save


def test_a_folder_of_another_backbone_is_refused(tmp_path):
    StateCache(tmp_path, new_model())
    with pytest.raises(ValueError, match="holds a run with another backbone"):
        StateCache(tmp_path, LMTPForCausalLM.from_backbone(tiny_llama(vocab_size=64, seed=3)))
    with pytest.raises(ValueError, match="another head_input"):
        StateCache(tmp_path, new_model(head_input="weighted"))


def test_sharding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="state_folder must be None with shard_backbone"):
        settings(shard_backbone=True, state_folder=str(tmp_path / "s"))


def test_rows_without_states_are_filled_with_zeros():
    def load(example):
        return torch.ones(len(example.input_ids), 6)

    rows = AnswerDataset([Example([5, 6, 7], 1), Example([8, 9], 1)], load_states=load)
    batch = collate([rows[0], rows[2]])["known_states"]
    assert batch.shape == (2, 3, 6)
    assert batch[0].eq(1).all()
    assert batch[1].eq(0).all()
    packs = PackedDataset(rows, 5)
    batch = collate_packs([packs[0], packs[1]])["known_states"]
    assert batch.shape == (2, 5, 6)
    assert batch.sum() == 30
    assert "known_states" not in collate([AnswerDataset([Example([5, 6], 1)])[0]])
