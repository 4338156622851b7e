"""Imported heads are the same heads: tensor by tensor, output by output; what does not fit is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import error_of, lmtp
from foreign_checkpoints import (
    HIDDEN,
    VOCAB,
    OfficialHeads,
    medusa_heads,
    save_backbone,
    save_medusa,
    save_official,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.converting import CheckOptions, ConvertOptions, convert_heads
from modeling_lmtp.conversion.foreign_files import TOKENIZER_FILES

PROMPT = torch.tensor([[5, 17, 60, 33, 41, 9]])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a backbone."""
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone(folder)
    return folder


def convert(source, output, backbone, **options):
    """Convert without the check of the leap, which has tests of its own, and load the result."""
    options["backbone"] = backbone and str(backbone)
    unchecked = CheckOptions(check_leap=False)
    report = convert_heads(ConvertOptions(str(source), output, **options), unchecked)
    return LMTPForCausalLM.from_pretrained(output).eval(), report


def assert_same_heads(model, theirs, tensor_of):
    """Compare tensors, and what the heads make of the backbone's states."""
    for index, head in enumerate(model.leap_heads):
        for layer, block in enumerate(head.blocks):
            assert torch.equal(block.linear.weight, tensor_of(index, layer, "weight"))
            assert torch.equal(block.linear.bias, tensor_of(index, layer, "bias"))
    with torch.no_grad():
        ours = model(PROMPT, output_leap_logits=True).leap_logits
        states = model.backbone.model(PROMPT).last_hidden_state
        for index, logits in enumerate(ours):
            torch.testing.assert_close(logits, theirs[index](states), rtol=1e-4, atol=1e-4)


def assert_generates(model):
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    assert torch.equal(
        model.generate(PROMPT, use_lmtp=True, **options), model.generate(PROMPT, **options)
    )


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("repeated", [True, False], ids=["repeated block", "blocks of their own"])
def test_medusa_heads(backbone, tmp_path, num_layers, repeated):
    heads = medusa_heads(3, num_layers, repeated=repeated)
    config = {"medusa_num_heads": 3, "medusa_num_layers": num_layers}
    save_medusa(tmp_path / "medusa", heads, {**config, "base_model_name_or_path": str(backbone)})
    model, report = convert(tmp_path / "medusa", tmp_path / "out", None)
    assert (report.layout, model.config.leap_offsets) == ("medusa", (2, 3, 4))
    assert not model.config.share_lm_head
    state = heads.state_dict()
    assert_same_heads(model, heads, lambda i, j, kind: state[f"{i}.{j}.linear.{kind}"])
    for index, head in enumerate(model.leap_heads):
        assert torch.equal(head.lm_head.weight, state[f"{index}.{num_layers}.weight"])
    assert_generates(model)


@pytest.mark.parametrize(
    "kind", ["without config", "prefix", "safetensors", "one file", "blocks once"]
)
def test_medusa_heads_in_other_files(backbone, tmp_path, kind):
    heads = medusa_heads(2, 2 if kind == "blocks once" else 1)
    source = tmp_path / "medusa"
    source.mkdir()
    state = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    if kind == "blocks once":  # as the Hub's conversion to safetensors leaves them
        saved = {name: tensor for name, tensor in state.items() if ".1.linear." not in name}
    else:
        saved = {("medusa_head." if kind == "prefix" else "") + n: t for n, t in state.items()}
    if kind in ("safetensors", "blocks once"):
        save_file(saved, source / "medusa_lm_head.safetensors")
    else:
        torch.save(saved, source / "medusa_lm_head.pt")
    found = source / "medusa_lm_head.pt" if kind == "one file" else source
    model, report = convert(found, tmp_path / "out", backbone)
    assert_same_heads(model, heads, lambda i, j, what: state[f"{i}.{j}.linear.{what}"])
    assert any("repeats one block" in note for note in report.notes) == (kind == "blocks once")


def test_heads_of_medusas_version_2_share_the_unembedding(backbone, tmp_path):
    heads = medusa_heads(2)
    source = tmp_path / "medusa"
    source.mkdir()
    torch.save(
        {name: tensor for name, tensor in heads.state_dict().items() if "linear" in name},
        source / "medusa_lm_head.pt",
    )
    model, _ = convert(source, tmp_path / "out", backbone)
    assert model.config.share_lm_head
    for head in heads:
        head[-1].weight = model.get_output_embeddings().weight
    state = heads.state_dict()
    assert_same_heads(model, heads, lambda i, j, kind: state[f"{i}.{j}.linear.{kind}"])


@pytest.mark.parametrize("copies", [2, 1], ids=["all", "all but one"])
def test_unembeddings_are_shared_where_all_equal_the_backbones(backbone, tmp_path, copies):
    heads = medusa_heads(2)
    unembedding = load_file(backbone / "model.safetensors")["lm_head.weight"]
    for head in list(heads)[:copies]:
        head[-1].weight.data.copy_(unembedding)
    save_medusa(tmp_path / "medusa", heads)
    model, _ = convert(tmp_path / "medusa", tmp_path / "out", backbone)
    assert model.config.share_lm_head == (copies == 2)
    state = heads.state_dict()
    assert_same_heads(model, heads, lambda i, j, kind: state[f"{i}.{j}.linear.{kind}"])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_official_heads(backbone, tmp_path, num_layers):
    heads = OfficialHeads(3, num_layers, repeated=True)
    config = {"n_head": 3, "head_num_layers": num_layers, "model_name": str(backbone)}
    body = save_backbone(tmp_path / "body")  # the same one
    save_official(tmp_path / "official", heads, body, config, skip_token=2)
    model, report = convert(tmp_path / "official", tmp_path / "out", None)
    assert (report.layout, model.config.leap_offsets) == ("official", (3, 5, 7))
    state = heads.state_dict()
    assert_same_heads(
        model, heads.heads, lambda i, j, kind: state[f"heads.{i}.resblock.{j}.l_proj.{kind}"]
    )
    assert any("repeats one block" in note for note in report.notes) == (num_layers > 1)
    assert not any("own backbone" in note for note in report.notes)
    assert_generates(model)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_backbone_tuned_with_the_heads_is_kept(tmp_path, tied):
    save_backbone(tmp_path / "backbone", tie_word_embeddings=tied)
    tuned = save_backbone(tmp_path / "tuned", tie_word_embeddings=tied, seed=1)
    config = {"n_head": 2, "model_name": str(tmp_path / "backbone"), "skip_token": 3}
    heads = OfficialHeads(2, 1, repeated=True)
    save_official(tmp_path / "official", heads, tuned, config)
    model, report = convert(tmp_path / "official", tmp_path / "out", None)
    assert model.config.leap_offsets == (4, 7)
    assert any("own backbone is kept" in note for note in report.notes)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, tuned(PROMPT).logits, rtol=0, atol=0)


def test_the_type_is_kept(tmp_path):
    backbone = save_backbone(tmp_path / "float32")
    backbone.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    tiny_tokenizer().save_pretrained(tmp_path / "bfloat16")
    heads = medusa_heads(2).to(torch.bfloat16)
    save_medusa(tmp_path / "medusa", heads)
    model, _ = convert(tmp_path / "medusa", tmp_path / "out", tmp_path / "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.leap_heads[1].lm_head.weight, heads[1][1].weight)
    with pytest.raises(
        ValueError, match=r"heads are torch.bfloat16 and the backbone torch.float32"
    ):
        convert(tmp_path / "medusa", tmp_path / "two", tmp_path / "float32")
    model, _ = convert(tmp_path / "medusa", tmp_path / "two", tmp_path / "float32", dtype="float32")
    assert torch.equal(model.leap_heads[1].lm_head.weight, heads[1][1].weight.float())


@pytest.mark.parametrize(
    ("options", "offsets"),
    [({"leap_stride": 2}, (3, 5)), ({"leap_offsets": [2, 5]}, (2, 5)), ({}, (2, 3))],
    ids=["stride", "offsets", "Medusa's own"],
)
def test_the_leap_may_be_given(backbone, tmp_path, options, offsets):
    save_medusa(tmp_path / "medusa", medusa_heads(2))
    model, _ = convert(tmp_path / "medusa", tmp_path / "out", backbone, **options)
    assert model.config.leap_offsets == offsets
    assert_generates(model)


def test_a_record_says_where_heads_came_from(backbone, tmp_path):
    save_medusa(tmp_path / "medusa", medusa_heads(2))
    convert(tmp_path / "medusa", tmp_path / "out", backbone)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (record["command"], record["layout"]) == ("lmtp convert", "medusa")
    assert record["base_model"] == str(backbone)
    assert set(record["source_sha256"]) == {"medusa_lm_head.pt"}


# What is wrong with a checkpoint, and what the error says
def remove(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


BROKEN = {
    "a key too many": (lambda s: s | {"0.7.extra": s["0.1.weight"]}, {}, "0.7.extra"),
    "a bias missing": (lambda s: remove(s, "1.0.linear.bias"), {}, r"missing: 1\.0\.linear\.bias"),
    "one unembedding missing": (lambda s: remove(s, "0.1.weight"), {}, r"missing: 0\.1\.weight"),
    "a head missing": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("0.")},
        {},
        r"the file has heads \[1\]",
    ),
    "no heads": (lambda s: {"weight": s["0.1.weight"]}, {}, "known layout"),
    "shapes": (lambda s: s | {"1.0.linear.weight": torch.zeros(8, 8)}, {}, r"\(8, 8\)"),
    "types": (lambda s: s | {"1.0.linear.bias": torch.zeros(HIDDEN).half()}, {}, "float16"),
    "number of heads": (dict, {"medusa_num_heads": 5}, "--num_heads 2"),
    "number of layers": (dict, {"medusa_num_layers": 2}, "medusa_num_layers=2"),
    "hidden size": (
        lambda s: {
            k: v[..., :8] if v.ndim == 1 or "1.weight" in k else v[:8, :8] for k, v in s.items()
        },
        {},
        "states of 8 numbers, but the backbone's have 32",
    ),
    "vocabulary": (
        lambda s: {k: v[:100] if "1.weight" in k else v for k, v in s.items()},
        {},
        "predict 100 tokens, but the backbone's vocabulary has 320",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused_and_leaves_nothing(backbone, tmp_path, kind):
    change, config, message = BROKEN[kind]
    (tmp_path / "in").mkdir()
    torch.save(change(medusa_heads(2).state_dict()), tmp_path / "in" / "medusa_lm_head.pt")
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out", backbone)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_published_configurations_that_miscount_can_be_overruled(backbone, tmp_path):
    heads = medusa_heads(3)
    save_medusa(tmp_path / "medusa", heads, {"medusa_num_heads": 2})
    model, _ = convert(tmp_path / "medusa", tmp_path / "three", backbone, num_heads=3)
    assert model.config.leap_offsets == (2, 3, 4)
    model, _ = convert(tmp_path / "medusa", tmp_path / "one", backbone, num_heads=1)
    assert torch.equal(model.leap_heads[0].lm_head.weight, heads[0][1].weight)
    with pytest.raises(ValueError, match="1 to 3"):
        convert(tmp_path / "medusa", tmp_path / "four", backbone, num_heads=4)


def test_an_official_checkpoint_must_hold_all_of_its_backbone_and_nothing_else(backbone, tmp_path):
    body = save_backbone(tmp_path / "body")
    config = {"model_name": str(backbone), "skip_token": 2}
    save_official(tmp_path / "in", OfficialHeads(1, 1, repeated=True), body, config)
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    save_file(remove(tensors, "model.norm.weight"), path)
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        convert(tmp_path / "in", tmp_path / "out", None)
    save_file(tensors | {"medusa.extra": torch.zeros(2)}, path)
    with pytest.raises(
        ValueError, match=r"neither to its heads nor to LlamaForCausalLM: medusa.extra"
    ):
        convert(tmp_path / "in", tmp_path / "out", None)
    save_file({name: t for name, t in tensors.items() if name.startswith("heads.")}, path)
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"skip_token in config.json is None.*--leap_stride"):
        convert(tmp_path / "in", tmp_path / "out", backbone)


def test_damaged_files_are_named(backbone, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    state = medusa_heads(1).state_dict()
    save_file(state, source / "model.safetensors")
    whole = (source / "model.safetensors").read_bytes()
    for damaged in (whole[:-100], whole[:5], b""):
        (source / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged or incomplete"):
            convert(source, tmp_path / "out", backbone)
    (source / "model.safetensors").unlink()
    torch.save(state, source / "medusa_lm_head.pt")
    whole = (source / "medusa_lm_head.pt").read_bytes()
    (source / "medusa_lm_head.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"medusa_lm_head.pt is damaged or incomplete"):
        convert(source, tmp_path / "out", backbone)
    (source / "medusa_lm_head.pt").write_bytes(whole)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        convert(source, tmp_path / "out", backbone)


class Spy:
    """Would run when unpickled."""

    opened = False

    def __reduce__(self):
        return (setattr, (Spy, "opened", True))


def test_a_pickle_with_code_is_not_run(backbone, tmp_path):
    torch.save({"0.0.linear.weight": Spy()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="could run any code"):
        convert(tmp_path, tmp_path / "out", backbone)
    assert not Spy.opened


def test_a_missing_shard_is_named(backbone, tmp_path):
    state = medusa_heads(2).state_dict()
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002.safetensors"):
        convert(tmp_path, tmp_path / "out", backbone)


def test_a_backbone_without_a_tokenizer_needs_none_to_be_converted(tmp_path):
    save_backbone(tmp_path / "backbone")
    for name in TOKENIZER_FILES:
        (tmp_path / "backbone" / name).unlink(missing_ok=True)
    save_medusa(tmp_path / "in", medusa_heads(1, 1))
    options = ("convert", tmp_path / "in", tmp_path / "out", "--backbone", tmp_path / "backbone")
    assert "has no tokenizer" in (message := error_of(*options))
    assert "--no_check_leap" in message
    assert lmtp(*options, "--no_check_leap").exit_code == 0  # as the error says
    assert LMTPForCausalLM.from_pretrained(tmp_path / "out").config.leap_offsets == (2,)


def test_another_tokenizer_is_refused(backbone, tmp_path):
    save_medusa(tmp_path / "medusa", medusa_heads(1))
    tiny_tokenizer().save_pretrained(tmp_path / "medusa")
    convert(tmp_path / "medusa", tmp_path / "out", backbone)
    words = models.WordLevel({"other": 0, "words": 1}, unk_token="other")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(tmp_path / "medusa")
    with pytest.raises(ValueError, match=r"not the backbone's: 2 tokens"):
        convert(tmp_path / "medusa", tmp_path / "two", backbone)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(28, "no space left")])
def test_a_failed_write_leaves_nothing(backbone, tmp_path, monkeypatch, error):
    save_medusa(tmp_path / "medusa", medusa_heads(1))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match=error.strerror):
        convert(tmp_path / "medusa", tmp_path / "out", backbone)
    assert [path.name for path in tmp_path.iterdir()] == ["medusa"]


def test_the_command_says_what_it_made_or_what_is_wrong(backbone, tmp_path):
    save_medusa(tmp_path / "medusa", medusa_heads(2))
    arguments = ["convert", tmp_path / "medusa", tmp_path / "out"]
    result = lmtp(*arguments, "--backbone", backbone)
    text = " ".join(result.output.split())
    assert result.exit_code == 0, text
    assert "could not be confirmed" in text  # random heads
    assert "Saved 2 heads (medusa layout, offsets (2, 3), separate unembeddings)" in text
    assert "already holds something" in error_of(*arguments, "--backbone", backbone)
    shutil.rmtree(tmp_path / "out")
    assert "does not name its backbone. Pass --backbone" in error_of(*arguments)


def test_constants_are_those_of_the_tiny_backbone(backbone):
    config = json.loads((backbone / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"]) == (HIDDEN, VOCAB)
