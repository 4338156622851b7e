"""Merged, an adapter answers as before, in every way in which PEFT touches embeddings."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.exporting import ExportOptions, export_checkpoint

PROMPT = torch.tensor([[5, 17, 6, 319]])
LARGER = 328
# PEFT says of tied and of resized embeddings what it does about them
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:(Model has|Model with|Input and output|Setting `save_embedding|You have requested|"
        "ensure_weight_tying)"
    ),
    # PEFT asks for what Transformers has renamed
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def lora(*targets, **options):
    return lambda: LoraConfig(target_modules=["q_proj", *targets], **options)


WAYS = {
    "elsewhere": lora(),
    "LoRA on the input": lora("embed_tokens"),
    "LoRA on the output": lora("lm_head"),
    "LoRA on both": lora("embed_tokens", "lm_head"),
    "LoRA on the input, tied": lora("embed_tokens", ensure_weight_tying=True),
    "input whole": lora(modules_to_save=["embed_tokens"]),
    "output whole": lora(modules_to_save=["lm_head"]),
    "input whole, tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": lora(trainable_token_indices=[5, 6]),
    "tokens of both": lora(trainable_token_indices={"embed_tokens": [5], "lm_head": [6]}),
    "tokens alone": lambda: TrainableTokensConfig(token_indices=[5, 6]),
}
TRIALS = [(way, None) for way in WAYS]
TRIALS += [(way, LARGER) for way in ("elsewhere", "LoRA on the output", "input whole", "tokens")]
# PEFT's own merge into tied embeddings that LoRA changes is wrong for every model, and warns
RIGHT_IN_PEFT = ("elsewhere", "input whole", "tokens", "tokens alone")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    backbone = tiny_llama(tie_word_embeddings=request.param)
    LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def adapted(base, way, vocab_size=None):
    """An adapter with random weights on a checkpoint, perhaps with a larger vocabulary."""
    model = LMTPForCausalLM.from_pretrained(base)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    adapter = get_peft_model(model, WAYS[way]()).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad and "leap_heads" not in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return adapter


@torch.no_grad()
def assert_same(loaded, expected):
    torch.testing.assert_close(loaded(input_ids=PROMPT).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("way", "vocab_size"), TRIALS)
def test_an_exported_adapter_answers_as_it_did(base, tmp_path, way, vocab_size):
    model = adapted(base, way, vocab_size)
    with torch.no_grad():
        expected = model(input_ids=PROMPT).logits
        unchanged = LMTPForCausalLM.from_pretrained(base)(input_ids=PROMPT).logits
    assert (expected[..., :300] - unchanged[..., :300]).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    options = ExportOptions(str(tmp_path / "adapter"), tmp_path / "full", to="full")
    export_checkpoint(options)
    assert_same(LMTPForCausalLM.from_pretrained(tmp_path / "full"), expected)


@pytest.mark.parametrize(("way", "vocab_size"), [t for t in TRIALS if t[0] in RIGHT_IN_PEFT])
def test_peft_merges_it_as_in_a_plain_model(base, tmp_path, way, vocab_size):
    model = adapted(base, way, vocab_size)
    with torch.no_grad():
        expected = model(input_ids=PROMPT).logits
    merged = model.merge_and_unload()
    assert_same(merged, expected)
    merged.save_pretrained(tmp_path)
    assert_same(LMTPForCausalLM.from_pretrained(tmp_path), expected)


def test_embeddings_that_stay_equal_stay_tied(base, tmp_path):
    tied = LMTPForCausalLM.from_pretrained(base).config.tie_word_embeddings
    for way, stays in (("tokens", tied), ("LoRA on the input", False)):
        folder = tmp_path / way
        adapted(base, way).save_pretrained(folder / "adapter")
        export_checkpoint(ExportOptions(str(folder / "adapter"), folder / "full", to="full"))
        saved = load_file(folder / "full" / "model.safetensors")
        assert ("backbone.lm_head.weight" not in saved) is stays


def test_an_adapter_after_a_resize_stores_the_embeddings(base, tmp_path):
    adapted(base, "elsewhere").save_pretrained(tmp_path / "same")
    adapted(base, "elsewhere", LARGER).save_pretrained(tmp_path / "resized")
    sizes = {}
    for name in ("same", "resized"):
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        sizes[name] = {len(weight) for key, weight in saved.items() if "lora" not in key}
    assert sizes == {"same": set(), "resized": {LARGER}}


def test_the_adapter_s_own_tokenizer_goes_with_its_vocabulary(base, tmp_path):
    adapted(base, "elsewhere", LARGER).save_pretrained(tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    export_checkpoint(ExportOptions(str(tmp_path / "adapter"), tmp_path / "plain", to="plain"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.vocab_size == LARGER
    exported = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert exported.convert_tokens_to_ids("<think>") == 320
