"""LoRA on backbone and heads, the heads themselves trained and saved with the adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import pipeline

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.loading import load_tokenizer
from modeling_lmtp.heads_lmtp import LeapHeads
from modeling_lmtp.modeling_lmtp import logger

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PROMPT = torch.tensor([[5, 17, 80, 33, 41, 9]])
DRAFT_IDS = tuple(range(0, 320, 2))

# name: what of the heads is trained whole, and the heads' settings
ADAPTED = {
    "heads": (["leap_heads"], {}),
    "heads with their own unembedding": (["leap_heads"], {"share_lm_head": False}),
    "heads with a low-rank unembedding": (
        ["leap_heads"],
        {"lm_head_rank": 4, "draft_token_ids": DRAFT_IDS},
    ),
    "path-grounded heads": (["leap_heads"], {"head_context": "path"}),
    "heads that read all layers": (["leap_heads"], {"head_input": "weighted"}),
    "heads one by one": (["leap_heads.0", "leap_heads.1"], {}),
    "no head, but adapters on all": (None, {"lm_head_rank": 4}),
}


def new_model(**settings):
    torch.manual_seed(1)
    return LMTPForCausalLM.from_backbone(
        tiny_llama(), leap_offsets=(2, 3), train_backbone=True, **settings
    )


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=PROMPT, labels=PROMPT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module", params=ADAPTED.values(), ids=ADAPTED.keys())
def adapted(request):
    """A trained adapter, and a function that builds what it stands on."""
    modules_to_save, settings = request.param
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", modules_to_save=modules_to_save)
    model = get_peft_model(new_model(**settings), config)
    train(model)
    return model.eval(), lambda: new_model(**settings).eval()


def generate(model, **options):
    return model.generate(input_ids=PROMPT, max_new_tokens=16, do_sample=False, **options)


@torch.no_grad()
def leap_logits(model):
    return model(input_ids=PROMPT, output_leap_logits=True).leap_logits


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft", [{"draft_length": 2}, {}], ids=["chain", "planned"])
def test_an_adapted_model_generates_the_same_with_and_without_leap_heads(adapted, draft):
    model, fresh = adapted
    plain = generate(model)
    assert torch.equal(generate(model, use_lmtp=True, **draft), plain)
    assert not torch.equal(generate(fresh()), plain), "the adapter changed nothing"


def test_what_decodes_is_what_was_trained(adapted):
    model, fresh = adapted
    trained = leap_logits(model)
    untrained = leap_logits(fresh())
    assert all((a - b).abs().max() > 0.1 for a, b in zip(trained, untrained, strict=True))
    with model.disable_adapter():
        assert_same(leap_logits(model), untrained)
    options = {"use_lmtp": True, "draft_length": 2, "return_dict_in_generate": True}
    steps = generate(model, **options).acceptance_lengths
    merged = model_copy(model, fresh).merge_and_unload()
    assert generate(merged, **options).acceptance_lengths == steps


def model_copy(model, fresh):
    copy = get_peft_model(fresh(), model.peft_config["default"])
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_an_adapter_loads_onto_a_fresh_model_and_merges_into_it(adapted, tmp_path):
    model, fresh = adapted
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    assert_same(leap_logits(loaded), leap_logits(model))
    merged = loaded.merge_and_unload()
    assert isinstance(merged, LMTPForCausalLM)
    assert type(merged.leap_heads) is LeapHeads
    assert merged.state_dict().keys() == fresh().state_dict().keys()
    assert_same(leap_logits(merged), leap_logits(model))
    assert torch.equal(generate(merged, use_lmtp=True), generate(model))
    merged.save_pretrained(tmp_path / "merged")
    again = LMTPForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(leap_logits(again), leap_logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_lm_head": False},
        {"lm_head_rank": 4},
        {"head_context": 1, "head_input": "weighted"},
    ],
    ids=str,
)
def test_all_weights_of_the_heads_train_and_those_beneath_stay(settings):
    config = LoraConfig(target_modules="all-linear", modules_to_save=["leap_heads"])
    model = get_peft_model(new_model(**settings), config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    of_heads = {name for name in before if "leap_heads.modules_to_save.default." in name}
    assert of_heads <= changed
    assert len(of_heads) == len(
        list(model.base_model.model.leap_heads.original_module.parameters())
    )
    assert not any("leap_heads.original_module" in name for name in changed)
    assert all("lora_" in name for name in changed - of_heads)
    assert any("backbone" in name for name in changed)


def test_an_adapter_names_the_heads_as_a_checkpoint_does(tmp_path):
    model = get_peft_model(
        new_model(), LoraConfig(target_modules="all-linear", modules_to_save=["leap_heads"])
    )
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    heads = {name for name in new_model().state_dict() if name.startswith("leap_heads.")}
    assert {f"base_model.model.{name}" for name in heads} <= saved.keys()


def test_a_frozen_backbone_s_adapter_that_cannot_learn_is_no_secret(monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    model = new_model()
    model.config.train_backbone = False
    adapted = get_peft_model(
        model, LoraConfig(target_modules="all-linear", modules_to_save=["leap_heads"])
    )
    adapted(input_ids=PROMPT, labels=PROMPT).loss.backward()
    [warning] = warnings
    assert "Set config.train_backbone=True to train them" in warning


def test_a_pipeline_takes_the_flag():
    generator = pipeline("text-generation", model=new_model(), tokenizer=tiny_tokenizer())
    options = {"max_new_tokens": 12, "do_sample": False}
    assert generator("The sea", use_lmtp=True, **options) == generator("The sea", **options)


def test_an_adapter_that_was_saved_without_a_tokenizer_has_that_of_its_checkpoint(tmp_path):
    LMTPForCausalLM.from_backbone(tiny_llama()).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    model = LMTPForCausalLM.from_pretrained(tmp_path / "checkpoint")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    found = load_tokenizer(tmp_path / "adapter")
    assert found.chat_template == tiny_tokenizer().chat_template
    own = tiny_tokenizer(chat_template=None)
    own.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").chat_template is None
