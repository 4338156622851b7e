"""Hooks and changes of the model after the first call: what was found out before does not hold any more."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_decoding import assert_decoded_plainly, warnings_said
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM, support_lmtp
from modeling_lmtp.support_lmtp import Tier, decoding_support

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PROMPT = torch.tensor([[5, 17, 80, 33, 41, 9]])
ROWS = torch.tensor([[5, 17, 80, 33, 41, 9], [9, 8, 33, 41, 5, 4], [11, 12, 13, 14, 15, 16]])
GREEDY = {"max_new_tokens": 24, "do_sample": False}
ADAPTER = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_alpha": 64}


def new_model(**settings):
    torch.manual_seed(0)
    model = LMTPForCausalLM.from_backbone(tiny_llama(**settings), leap_offsets=(2, 3, 4))
    model.generate(PROMPT, use_lmtp=True, max_new_tokens=2)  # finds out once what fits the backbone
    return model.eval()


def shifted(states):
    return states + 3 * torch.linspace(-1, 1, states.shape[-1])


def of_the_last_token(_module, _args, states):
    return torch.cat([states[:, :-1], shifted(states[:, -1:])], dim=1)


def of_passes_over_one_token(_module, _args, states):
    return shifted(states) if states.shape[1] == 1 else states


def of_every_token(_module, _args, states):
    return shifted(states)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("steer", [of_the_last_token, of_passes_over_one_token])
def test_a_hook_that_depends_on_the_tokens_of_a_pass_is_decoded_plainly(steer, layer):
    model = new_model()
    unsteered = model.generate(PROMPT, **GREEDY)
    handle = model.backbone.model.layers[layer].register_forward_hook(steer)
    assert not torch.equal(model.generate(PROMPT, **GREEDY), unsteered)
    assert_decoded_plainly(model, "several tokens at once", {"inputs": PROMPT, **GREEDY})
    handle.remove()
    assert decoding_support(model.backbone).tier is Tier.TREE
    assert torch.equal(model.generate(PROMPT, use_lmtp="strict", **GREEDY), unsteered)


def test_a_hook_that_treats_tokens_alike_is_drafted_for():
    model = new_model()
    model.backbone.model.layers[0].register_forward_hook(of_every_token)
    plain = model.generate(PROMPT, **GREEDY)
    assert torch.equal(model.generate(PROMPT, use_lmtp="strict", **GREEDY), plain)


def test_a_backbone_is_tried_once_for_its_modules_and_hooks(monkeypatch):
    tried = []
    probe = support_lmtp._probe_tiers
    monkeypatch.setattr(support_lmtp, "_probe_tiers", lambda b: tried.append(1) or probe(b))
    model, seen = new_model(), []
    for _ in range(3):
        model.generate(PROMPT, use_lmtp=True, **GREEDY)
    assert len(tried) == 1

    class Watch:
        def see(self, module, args, kwargs):
            seen.append(len(kwargs))

    for _ in range(3):  # as a clock that times one call does
        hook = model.backbone.register_forward_pre_hook(Watch().see, with_kwargs=True)
        model.generate(PROMPT, use_lmtp="strict", **GREEDY)
        hook.remove()
    assert seen
    assert len(tried) == 2


def test_dropout_that_is_switched_on_in_a_part_is_decoded_plainly():
    model = new_model(attention_dropout=0.3)
    model.backbone.model.layers[1].self_attn.train()
    with pytest.raises(ValueError, match="would decode plainly"):
        model.generate(PROMPT, use_lmtp="strict", **GREEDY)


class CoarseLinear(torch.nn.Linear):
    """Rounds all tokens of a pass by their largest value, as dynamic quantization does."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scale = states.abs().max() / 7
        return super().forward((states / scale).round() * scale)


def test_layers_that_are_replaced_by_coarser_ones_are_decoded_plainly():
    model = new_model()
    for layer in model.backbone.model.layers:
        layer.mlp.down_proj.__class__ = CoarseLinear
    assert_decoded_plainly(model, "cannot be taken out", {"inputs": PROMPT, **GREEDY})


def with_two_adapters(**settings):
    adapted = get_peft_model(new_model(), LoraConfig(**ADAPTER, **settings), adapter_name="one")
    adapted.add_adapter("two", LoraConfig(**ADAPTER, **settings))
    return adapted.eval()


@pytest.mark.parametrize("modules_to_save", [None, ["leap_heads"]], ids=["LoRA", "and heads"])
@pytest.mark.parametrize(
    "names", [["one", "two", "__base__"], ["two"]], ids=["batch", "single row"]
)
def test_each_row_may_have_an_adapter_of_its_own(modules_to_save, names):
    model = with_two_adapters(modules_to_save=modules_to_save)
    model.generate(input_ids=PROMPT, use_lmtp=True, max_new_tokens=2)
    rows = ROWS[: len(names)]
    options = {"input_ids": rows, "attention_mask": torch.ones_like(rows), **GREEDY}
    options["eos_token_id"] = model.generate(adapter_names=names, **options)[:, 14].tolist()
    plain = model.generate(adapter_names=names, **options)
    assert not torch.equal(model.generate(**options)[:, :15], plain[:, :15])
    with warnings_said() as said:
        fast = model.generate(adapter_names=names, use_lmtp=True, **options)
    assert torch.equal(fast, plain)
    assert "adapter_names" in said[0]
    # Without names, the active adapter is drafted for
    plain = model.generate(**options)
    assert torch.equal(model.generate(use_lmtp="strict", **options), plain)


def test_an_adapter_that_is_invoked_by_tokens_of_the_prompt_is_decoded_plainly():
    options = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS), **GREEDY}
    unadapted = new_model().generate(**options)
    config = LoraConfig(**ADAPTER, task_type="CAUSAL_LM", alora_invocation_tokens=[33, 41])
    model = get_peft_model(new_model(), config).eval()
    plain = model.generate(**options)
    assert (plain != unadapted).any(dim=1).tolist() == [True, True, False]
    assert torch.equal(model.generate(use_lmtp=True, **options), plain)
    with pytest.raises(ValueError, match="activated LoRA"):
        model.generate(use_lmtp="strict", **options)
