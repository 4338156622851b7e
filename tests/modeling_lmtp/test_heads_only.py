"""A heads-only checkpoint: small, and whole again with the backbone that it names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.heads_only_lmtp import logger

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])
KINDS = {
    "shared unembedding": {},
    "own unembeddings": {"share_lm_head": False},
    "grounded": {"head_context": 2, "draft_token_ids": tuple(range(0, 320, 2))},
    "weighted, low rank": {"head_input": "weighted", "lm_head_rank": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def wrapped(base, **settings) -> LMTPForCausalLM:
    model = LMTPForCausalLM.from_backbone(base, leap_offsets=(2, 3), **settings)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    model.generation_config.draft_tree = [[0], [1]]
    return model.eval()


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def saved(request, base, tmp_path_factory):
    """A model and its heads-only checkpoint."""
    folder = tmp_path_factory.mktemp("heads")
    model = wrapped(base, **request.param)
    model.save_pretrained(folder, heads_only=True)
    return model, folder


@pytest.fixture(scope="module")
def one(base, tmp_path_factory):
    """The same, of one kind, where kinds make no difference."""
    folder = tmp_path_factory.mktemp("one")
    model = wrapped(base)
    model.save_pretrained(folder, heads_only=True)
    return model, folder


@torch.no_grad()
def assert_same_model(loaded, model):
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ours, theirs = (m(PROMPT, output_leap_logits=True) for m in (loaded, model))
    assert torch.equal(ours.logits, theirs.logits)
    assert all(map(torch.equal, ours.leap_logits, theirs.leap_logits))


def test_only_the_heads_are_saved(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    heads = {name for name in model.state_dict() if name.startswith("leap_heads.")}
    assert tensors.keys() == heads
    assert json.loads((folder / "config.json").read_text())["heads_only"] is True
    assert not model.config.heads_only


@pytest.mark.parametrize("auto_class", [LMTPForCausalLM, AutoModel, AutoModelForCausalLM])
def test_loading_fetches_the_backbone(saved, auto_class):
    model, folder = saved
    loaded = auto_class.from_pretrained(folder)
    assert_same_model(loaded, model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.backbone.parameters())
    assert loaded.generation_config.draft_tree == [[0], [1]]
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = loaded.generate(PROMPT, **options)
    assert torch.equal(loaded.generate(PROMPT, use_lmtp=True, **options), plain)


def test_saved_again_it_is_a_full_checkpoint(one, tmp_path):
    model, folder = one
    LMTPForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).heads_only is False
    assert_same_model(LMTPForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("given", ["id", "folder", "model"])
def test_a_backbone_at_hand_is_used(one, base, given):
    model, folder = one
    backbones = {
        "id": str(base),
        "folder": base,
        "model": AutoModelForCausalLM.from_pretrained(base),
    }
    loaded = LMTPForCausalLM.from_pretrained(folder, backbone=backbones[given])
    assert given != "model" or loaded.backbone is backbones["model"]
    assert_same_model(loaded, model)


def test_options_reach_the_backbone(one):
    _, folder = one
    loaded = LMTPForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", train_backbone=True
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.backbone.config._attn_implementation == "eager"
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size 64 instead of 32"),
        ({"vocab_size": 300}, "vocab_size 300 instead of 320"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 instead of 2"),
    ],
    ids=str,
)
def test_another_backbone_is_refused(one, sizes, message):
    _, folder = one
    with pytest.raises(ValueError, match=message):
        LMTPForCausalLM.from_pretrained(folder, backbone=tiny_llama(**sizes))


def test_another_revision_warns(one, monkeypatch):
    _, folder = one
    warnings = []
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    backbone = tiny_llama()
    backbone.config._commit_hash = "b" * 40
    LMTPForCausalLM.from_pretrained(folder, backbone=backbone, base_model_revision="a" * 40)
    [warning] = warnings
    assert f"revision {'a' * 40}" in warning
    assert f"revision {'b' * 40}" in warning


def test_the_pinned_revision_is_asked_for_and_said(one, base, monkeypatch):
    _, folder = one
    warnings, asked = [], {}
    monkeypatch.setattr(logger, "warning_once", warnings.append)

    def load(name, **options):
        asked.update(name=name, **options)
        return tiny_llama()

    monkeypatch.setattr("modeling_lmtp.heads_only_lmtp.AutoModelForCausalLM.from_pretrained", load)
    LMTPForCausalLM.from_pretrained(folder, base_model_revision="a" * 40)
    assert (asked["name"], asked["revision"]) == (str(base), "a" * 40)
    assert f"revision {'a' * 40}" in warnings[0]


def test_a_backbone_for_a_full_checkpoint_is_refused(base, tmp_path):
    wrapped(base).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contains a backbone"):
        LMTPForCausalLM.from_pretrained(tmp_path, backbone=base)


def test_heads_that_do_not_name_their_backbone_are_not_saved(tmp_path):
    model = LMTPForCausalLM.from_backbone(tiny_llama())
    with pytest.raises(ValueError, match="base_model_name_or_path is not set"):
        model.save_pretrained(tmp_path / "heads", heads_only=True)
    assert not (tmp_path / "heads").exists()


def test_a_vocabulary_that_the_named_backbone_lacks_is_refused_before_saving(base, tmp_path):
    model = wrapped(base)
    model.resize_token_embeddings(328)
    with pytest.raises(
        ValueError, match=r"vocab_size 328 instead of 320 .*heads_only=False; or save"
    ):
        model.save_pretrained(tmp_path / "heads", heads_only=True)
    assert not (tmp_path / "heads").exists()
    model.backbone.save_pretrained(tmp_path / "resized")  # as the error says
    model.config.base_model_name_or_path = str(tmp_path / "resized")
    model.save_pretrained(tmp_path / "heads", heads_only=True)
    assert_same_model(LMTPForCausalLM.from_pretrained(tmp_path / "heads"), model)


def test_missing_heads_are_refused(one):
    _, folder = one
    config = AutoConfig.from_pretrained(folder)
    config.leap_offsets = (2, 3, 5)
    with pytest.raises(ValueError, match=r"leap_heads\.2\.\S+: missing"):
        LMTPForCausalLM.from_pretrained(folder, config=config)


def test_loading_information_is_still_given(one):
    _, folder = one
    model, info = LMTPForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, LMTPForCausalLM)
    assert not info["missing_keys"]


@pytest.mark.parametrize("heads_only", [True, False], ids=["heads only", "full"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_saving_never_destroys_the_backbone(tmp_path, monkeypatch, heads_only, relative):
    tiny_llama().save_pretrained(tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    model = LMTPForCausalLM.from_backbone(tmp_path / "base", leap_offsets=(2, 3))
    monkeypatch.chdir(tmp_path)
    folder = "base" if relative else tmp_path / "base"
    with pytest.raises(
        ValueError, match="holds a model of the kind 'llama', and saving there would"
    ):
        model.save_pretrained(folder, heads_only=heads_only)
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    model.save_pretrained("new", heads_only=heads_only)
    model.save_pretrained("new", heads_only=heads_only)  # its own kind it may replace
