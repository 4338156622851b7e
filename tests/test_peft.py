"""LoRA on backbone and heads, the heads themselves trained and saved with the adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from transformers import pipeline

from modeling_lmtp import LMTPForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PROMPT = torch.tensor([[5, 17, 80, 33, 41, 9]])


def new_model():
    return LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2, 3), train_backbone=True)


@pytest.fixture(scope="module")
def adapted():
    torch.manual_seed(0)
    heads = ["leap_heads.0", "leap_heads.1"]
    model = get_peft_model(
        new_model(), LoraConfig(target_modules="all-linear", modules_to_save=heads)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model(input_ids=PROMPT, labels=PROMPT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def generate(model, **options):
    return model.generate(input_ids=PROMPT, max_new_tokens=16, do_sample=False, **options)


def test_an_adapted_model_generates_the_same_with_and_without_leap_heads(adapted):
    plain = generate(adapted)
    assert torch.equal(generate(adapted, use_lmtp=True), plain)
    assert not torch.equal(generate(new_model()), plain), "the adapter changed nothing"


def test_an_adapter_holds_the_heads_and_loads_onto_a_fresh_model(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new_model(), tmp_path).eval()
    logits = loaded(input_ids=PROMPT, output_leap_logits=True).leap_logits
    expected = adapted(input_ids=PROMPT, output_leap_logits=True).leap_logits
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, LMTPForCausalLM)
    assert torch.equal(generate(merged, use_lmtp=True), generate(adapted))


def test_a_pipeline_takes_the_flag():
    generator = pipeline("text-generation", model=new_model(), tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": 12, "do_sample": False}
    assert generator("The sea", use_lmtp=True, **options) == generator("The sea", **options)
