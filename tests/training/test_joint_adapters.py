"""What joint tuning leaves behind: a small adapter with the heads in it, or a merged checkpoint."""

import pytest
import torch
from joint_runs import PROMPT, examples, joint_tune, new_model, settings
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.training.adapters import add_adapters
from modeling_lmtp.training.examples import AnswerDataset, collate

# PEFT asks for what Transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# how the heads were trained, and what heads there are
KINDS = {
    "LoRA": ("lora", {}),
    "whole heads": ("full", {}),
    "own unembeddings": ("lora", {"share_lm_head": False}),
    "grounded, two layers": ("lora", {"head_context": 2, "num_head_layers": 2}),
    "whole grounded heads": ("full", {"head_context": 2}),
    "path-grounded, low-rank unembeddings": ("lora", {"head_context": "path", "lm_head_rank": 4}),
    "draft vocabulary": ("lora", {"draft_token_ids": tuple(range(40))}),
}


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=PROMPT, output_leap_logits=True)
    return [found.logits, *found.leap_logits]


def generate(model, **options):
    return model.generate(input_ids=PROMPT, max_new_tokens=16, do_sample=False, **options)


def assert_equal_outputs(model, expected, **tolerance):
    for ours, theirs in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def tuned(request, tmp_path_factory):
    """The tuned model's outputs, the folders of its base and adapter, and the merged model."""
    heads, options = request.param
    folder = tmp_path_factory.mktemp("joint")
    new_model(**options).save_pretrained(folder / "base")
    model = LMTPForCausalLM.from_pretrained(folder / "base")
    changes = {"head_training": heads, "head_learning_rate": 2e-2}
    run = joint_tune(model, examples(), [], folder / "run", settings(**changes))
    adapted = run.model
    adapted.save_pretrained(folder / "adapter")
    return adapted, outputs(adapted), folder


def test_an_adapter_loads_onto_a_fresh_base(tuned):
    _, expected, folder = tuned
    base = LMTPForCausalLM.from_pretrained(folder / "base")
    before = outputs(base)
    for ours, theirs in zip(before, expected, strict=True):
        assert not torch.allclose(ours, theirs, atol=1e-3)  # tuning has moved each of them
    assert_equal_outputs(PeftModel.from_pretrained(base, folder / "adapter"), expected)


@pytest.mark.parametrize("loader", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_an_adapter_knows_its_base(tuned, loader):
    _, expected, folder = tuned
    assert_equal_outputs(loader.from_pretrained(folder / "adapter"), expected)


def test_an_adapter_is_small_and_holds_the_heads(tuned):
    adapted, _, folder = tuned
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    of_heads = [name for name in tensors if "leap_heads" in name]
    assert of_heads
    assert not any("embed_tokens" in name or "backbone.lm_head" in name for name in tensors)
    size = sum(tensor.numel() for name, tensor in tensors.items() if name not in of_heads)
    backbone = adapted.get_base_model().backbone
    features = sum(
        sum(module.base_layer.weight.shape)
        for module in backbone.modules()
        if hasattr(module, "base_layer")
    )
    assert size == settings().lora_r * features  # A and B of every linear layer, nothing more
    if not any("modules_to_save" in name for name, _ in adapted.named_parameters()):
        assert all("lora_" in name for name in tensors)


def test_the_merged_model_is_plain_and_the_same(tuned, tmp_path):
    _, expected, folder = tuned
    base = LMTPForCausalLM.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    assert type(merged) is LMTPForCausalLM
    assert merged.state_dict().keys() == new_model_keys(folder)
    assert_equal_outputs(merged, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = LMTPForCausalLM.from_pretrained(tmp_path)
    assert_equal_outputs(again, outputs(merged), rtol=0, atol=0)
    assert torch.equal(generate(again, use_lmtp=True), generate(again))


def new_model_keys(folder):
    return LMTPForCausalLM.from_pretrained(folder / "base").state_dict().keys()


def test_the_tuned_model_generates_the_same_with_and_without_leap_heads(tuned):
    adapted, _, _ = tuned
    assert torch.equal(generate(adapted, use_lmtp=True), generate(adapted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_what_trains_is_in_32(dtype):
    for heads in ("lora", "full"):
        adapted = add_adapters(new_model(dtype), rank=4, heads=heads)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in trained} == {torch.float32}


def test_another_way_to_train_heads_is_refused():
    with pytest.raises(ValueError, match="heads must be one of lora, full, none, got 'some'"):
        add_adapters(new_model(), heads="some")


def test_the_plain_trainer_takes_an_adapted_model(tmp_path):
    model = new_model(train_backbone=True, leap_loss_weight=0.5)
    batch = collate([AnswerDataset(examples())[index] for index in range(8)])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [AnswerDataset(examples())[index] for index in range(8)]
    trainer = Trainer(model=adapted, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(new_model(), tmp_path / "adapter")
    assert_equal_outputs(loaded, outputs(adapted.eval()))
