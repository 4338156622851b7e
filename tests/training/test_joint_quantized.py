"""Adapters on a backbone that bitsandbytes has quantized; runs where it is installed."""

import pytest
import torch
from joint_runs import PROMPT, examples, joint_tune, settings
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer
from transformers import BitsAndBytesConfig

from modeling_lmtp import LMTPForCausalLM

bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = [
    # PEFT asks for what Transformers has renamed
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # LLM.int8 computes in float16 whatever it is given
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
]
KIND = {4: "Linear4bit", 8: "Linear8bitLt"}


@pytest.fixture(scope="module", params=[{}, {"share_lm_head": False}], ids=["shared", "own"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    backbone = tiny_llama(vocab_size=64, hidden_size=64, intermediate_size=128)
    model = LMTPForCausalLM.from_backbone(backbone, leap_offsets=(2, 3), **request.param)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_quantized(folder, bits, dtype="auto"):
    """What the training guide says: unembedding and heads stay whole."""
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
        llm_int8_skip_modules=["leap_heads", "lm_head"],
    )
    return LMTPForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


@pytest.mark.parametrize("bits", [4, 8])
def test_only_the_backbone_is_quantized(folder, bits):
    model = load_quantized(folder, bits)
    layers = [*model.backbone.model.layers.modules()]
    assert sum(type(layer).__name__ == KIND[bits] for layer in layers) == 14
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert not any(KIND[bits] in type(part).__name__ for part in model.leap_heads.modules())


@pytest.mark.parametrize("heads", ["lora", "full"])
def test_in_8_bits_backbone_and_heads_learn(folder, tmp_path, heads):
    model = load_quantized(folder, 8)
    options = {"head_training": heads, "kl_weight": 0.1, "learning_rate": 1e-2}
    report = joint_tune(model, examples(), examples(4, 1), tmp_path, settings(**options))
    tuned = report.model
    for name in ("loss_ntp", "loss_head_2"):
        losses = [entry[name] for entry in report.state.log_history if name in entry]
        assert sum(losses[-2:]) < sum(losses[:2])
    assert report.drift_report(examples(4, 1)).kl > 0
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_quantized(folder, 8), tmp_path / "adapter")
    with torch.no_grad():
        ours, theirs = again(input_ids=PROMPT).logits, tuned(input_ids=PROMPT).logits
    torch.testing.assert_close(ours, theirs)


def test_in_8_bits_leap_heads_do_not_draft(folder):
    model = load_quantized(folder, 8, "float32")
    with pytest.raises(ValueError, match="rejected candidates leave a trace"):
        model.generate(PROMPT, use_lmtp=True, max_new_tokens=4)


def test_in_4_bits_a_cpu_gives_no_gradients_and_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="4 bits on the CPU"):
        joint_tune(load_quantized(folder, 4), examples(), [], tmp_path / "run", settings())
    assert not (tmp_path / "run").exists()


def test_in_4_bits_leap_heads_draft(folder):
    model = load_quantized(folder, 4, "float32")
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    assert torch.equal(
        model.generate(PROMPT, use_lmtp=True, **options), model.generate(PROMPT, **options)
    )
