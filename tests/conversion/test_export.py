"""`lmtp export`: adapters merged, heads joined with their backbone, plain backbones, Medusa's layout."""

from __future__ import annotations

import json

import pytest
import torch
from commands import error_of, lmtp
from foreign_checkpoints import medusa_heads
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.converting import CheckOptions, ConvertOptions, convert_heads
from modeling_lmtp.conversion.exporting import ExportOptions, export_checkpoint
from modeling_lmtp.training.adapters import add_adapters

# PEFT asks for what Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PROMPT = torch.tensor([[5, 17, 60, 33, 41, 9]])


def new_checkpoint(folder, **options):
    """Save a checkpoint whose heads are no longer the identity, with its tokenizer."""
    model = LMTPForCausalLM.from_backbone(tiny_llama(), **{"leap_offsets": (2, 3), **options})
    perturb(model.leap_heads.parameters())
    model.config.base_model_name_or_path = "some/backbone"
    model.generation_config.use_lmtp = True
    model.generation_config.draft_length = 2
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


def export(source, output, to, **options):
    return export_checkpoint(ExportOptions(str(source), output, to=to, **options))


def perturb(parameters):
    generator = torch.Generator().manual_seed(8)
    for parameter in parameters:
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=PROMPT, output_leap_logits=True)
    return [found.logits, *found.leap_logits]


def assert_equal(ours, theirs, **tolerance):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture(scope="module", params=["lora", "full"])
def adapter(request, tmp_path_factory):
    """A checkpoint in `base`, an adapter in `adapter`, and what both together answer."""
    folder = tmp_path_factory.mktemp("adapter")
    new_checkpoint(folder / "base")
    adapted = add_adapters(
        LMTPForCausalLM.from_pretrained(folder / "base"), rank=4, heads=request.param
    )
    perturb(p for p in adapted.parameters() if p.requires_grad)
    adapted.eval().save_pretrained(folder / "adapter")
    return folder, outputs(adapted)


def test_merged_it_is_a_full_checkpoint(adapter, tmp_path):
    folder, expected = adapter
    export(folder / "adapter", tmp_path / "merged", "full")
    model = LMTPForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal(outputs(model), expected, rtol=1e-4, atol=1e-4)
    base = LMTPForCausalLM.from_pretrained(folder / "base")
    whole = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    assert_equal(outputs(model), outputs(whole.eval()), rtol=0, atol=0)
    record = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    assert (record["command"], record["to"]) == ("lmtp export", "full")
    assert record["source"] == str(folder / "adapter")
    assert (record["checkpoint"], record["base_model"]) == (str(folder / "base"), "some/backbone")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()


STORED = {"told to": {}, "targeted": {"target_modules": ["q_proj", "embed_tokens"]}}


def save_with_embeddings(folder, base, num_tokens=None, **settings):
    """Save an adapter that stores changed embeddings, and return what it answers."""
    model = LMTPForCausalLM.from_pretrained(base)
    if num_tokens is not None:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    adapted.save_pretrained(folder, save_embedding_layers=True)
    return outputs(adapted)


@pytest.mark.parametrize("settings", STORED.values(), ids=STORED)
def test_embeddings_that_an_adapter_stores_are_merged(tmp_path, settings):
    new_checkpoint(tmp_path / "base")
    expected = save_with_embeddings(tmp_path / "adapter", tmp_path / "base", **settings)
    export(tmp_path / "adapter", tmp_path / "merged", "full")
    model = LMTPForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal(outputs(model), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_of_a_resized_vocabulary_give_the_checkpoint_that_vocabulary(tmp_path):
    new_checkpoint(tmp_path / "base")
    expected = save_with_embeddings(tmp_path / "adapter", tmp_path / "base", 330)
    export(tmp_path / "adapter", tmp_path / "merged", "full")
    model = LMTPForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal(outputs(model), expected, rtol=1e-4, atol=1e-4)


def test_without_heads_it_is_a_plain_backbone(adapter, tmp_path):
    folder, expected = adapter
    export(folder / "adapter", tmp_path / "plain", "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected[0], rtol=1e-4, atol=1e-4)


def test_a_backbone_comes_out_of_a_checkpoint_as_it_went_in(tmp_path):
    new_checkpoint(tmp_path / "checkpoint")
    tiny_llama().save_pretrained(tmp_path / "original")
    export(tmp_path / "checkpoint", tmp_path / "plain", "plain")
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "original"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "original")
    )
    assert ours == theirs
    settings = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.5
    assert not {"use_lmtp", "draft_length", "draft_tree"} & settings.keys()
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "lmtp" not in (tmp_path / "plain" / "config.json").read_text()


def test_draft_settings_of_0_1_stay_out_of_a_plain_backbone(tmp_path):
    model = new_checkpoint(tmp_path / "checkpoint")
    model.generation_config.draft_by_batch_size = {"1": {"draft_nodes": 8}}
    model.generation_config.draft_conditions = {"quiet": True}
    assert "draft_by_batch_size" in tuned_names(model)
    model.save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "plain", "plain")
    settings = json.loads((tmp_path / "plain" / "generation_config.json").read_text())
    assert not settings.keys() & tuned_names(model)
    assert settings["repetition_penalty"] == 1.5


def tuned_names(model):
    """Return what the model's generation settings have that Transformers' own do not."""
    return model.generation_config.to_dict().keys() - GenerationConfig().to_dict().keys()


@pytest.mark.parametrize("tokenizer", [True, False], ids=["with tokenizer", "without"])
def test_heads_and_their_backbone_become_one_checkpoint(tmp_path, tokenizer):
    model = new_checkpoint(tmp_path / "whole")
    model.save_pretrained(tmp_path / "heads", heads_only=True)
    if tokenizer:
        tiny_tokenizer().save_pretrained(tmp_path / "heads")
    tiny_llama().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    export(tmp_path / "heads", tmp_path / "full", "full", base=str(tmp_path / "backbone"))
    full = LMTPForCausalLM.from_pretrained(tmp_path / "full").eval()
    assert_equal(outputs(full), outputs(model), rtol=0, atol=0)
    assert not full.config.heads_only
    assert AutoTokenizer.from_pretrained(tmp_path / "full").get_vocab()


def test_what_cannot_be_merged_is_refused(adapter, tmp_path):
    folder, _ = adapter
    with pytest.raises(ValueError, match=r"is a full checkpoint already.*--to plain"):
        export(folder / "base", tmp_path / "out", "full")
    with pytest.raises(ValueError, match=r"holds its own backbone\. Leave --base out"):
        export(folder / "base", tmp_path / "out", "plain", base="x")
    tiny_llama().save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"has no leap heads. Train some with `lmtp train"):
        export(tmp_path / "backbone", tmp_path / "out", "full")
    for offsets in ((2,), (2, 3, 4)):
        other = tmp_path / f"{len(offsets)} heads"
        new_checkpoint(other, leap_offsets=offsets)
        with pytest.raises(ValueError, match=r"does not fit the checkpoint.*--base"):
            export(folder / "adapter", tmp_path / "out", "full", base=str(other))
    (tmp_path / "damaged").mkdir()
    for path in (folder / "adapter").iterdir():
        content = path.read_bytes()
        cut = len(content) - 50 if path.suffix == ".safetensors" else len(content)
        (tmp_path / "damaged" / path.name).write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"adapter .* is damaged"):
        export(tmp_path / "damaged", tmp_path / "out", "full")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="already holds something"):
        export(folder / "adapter", folder / "base", "full")


HEADS = {
    "shared unembedding": {},
    "unembeddings of their own": {"share_lm_head": False},
    "two layers": {"num_head_layers": 2},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_go_to_medusas_layout_and_come_back(tmp_path, kind):
    before = new_checkpoint(tmp_path / "checkpoint", **HEADS[kind])
    tiny_llama().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    assert export(tmp_path / "checkpoint", tmp_path / "out", "medusa") == []
    backbone = str(tmp_path / "backbone")
    options = ConvertOptions(str(tmp_path / "out"), tmp_path / "again", backbone=backbone)
    convert_heads(options, CheckOptions(check_leap=False))
    after = LMTPForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert after.config.share_lm_head == before.config.share_lm_head
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    assert_equal(outputs(after), outputs(before), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_medusas_own_modules_take_them(tmp_path, rank):
    model = new_checkpoint(tmp_path / "checkpoint", lm_head_rank=rank)
    notes = export(tmp_path / "checkpoint", tmp_path / "out", "medusa")
    assert bool(notes) == bool(rank)
    heads = medusa_heads(2)
    heads.load_state_dict(load_file(tmp_path / "out" / "medusa_lm_head.safetensors"))
    with torch.no_grad():
        states = model.backbone.model(PROMPT).last_hidden_state
        assert_equal([head(states) for head in heads], outputs(model)[1:], rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"medusa_num_heads": 2, "medusa_num_layers": 1, "hidden_size": 32, "vocab_size": 320}
    assert config | expected | {"base_model_name_or_path": "some/backbone"} == config


REFUSED = {
    "other offsets": ({"leap_offsets": (3, 5)}, r"its heads predict \(2, 3\), yours \(3, 5\)"),
    "no heads": ({"leap_offsets": ()}, "there are no heads"),
    "grounded": ({"head_context": 1}, "head_context=1"),
    "path-grounded": ({"head_context": "path"}, "head_context='path'"),
    "weighted": ({"head_input": "weighted"}, "head_input='weighted'"),
    "draft vocabulary": ({"draft_token_ids": tuple(range(9))}, "draft_token_ids"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_medusa_cannot_express_is_refused_with_the_reason(tmp_path, kind):
    options, reason = REFUSED[kind]
    new_checkpoint(tmp_path / "checkpoint", **options)
    with pytest.raises(ValueError, match=f"cannot express these heads: .*{reason}"):
        export(tmp_path / "checkpoint", tmp_path / "out", "medusa")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_saved(adapter, tmp_path):
    folder, _ = adapter

    def text_of(*arguments):
        result = lmtp("export", *arguments)
        assert result.exit_code == 0, result.output
        return " ".join(result.stdout.split())

    text = text_of(folder / "adapter", tmp_path / "merged", "--to", "full")
    assert text == f"Saved the full checkpoint in {tmp_path / 'merged'}."
    text = text_of(folder / "adapter", tmp_path / "plain", "--to=plain")
    assert text == f"Saved the plain backbone in {tmp_path / 'plain'}."
    text = text_of(tmp_path / "merged", tmp_path / "vllm", "--to", "vllm")
    assert "Serve them with: vllm serve" in text
    assert text.endswith(f"Saved backbone and heads in {tmp_path / 'vllm'}.")
    again = error_of("export", tmp_path / "merged", tmp_path / "vllm", "--to", "vllm")
    assert "already holds something" in again
    assert "--to: invalid choice: 'gguf'" in error_of("export", "x", "y", "--to", "gguf")
    assert "required: --to" in error_of("export", "x", "y")
