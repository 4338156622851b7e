"""Save the checkpoints that later versions must load: `python tests/helpers/save_fixture.py`.

Code is not kept: what is tested is that new code reads old configurations, tensors and settings.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tiny import tiny_llama

from modeling_lmtp import LMTPForCausalLM, __version__

FIXTURES = Path(__file__).parents[1] / "fixtures"
PROMPT = [[3, 17, 5, 9, 44]]
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
# By name, settings of the heads: every kind of tensor that a checkpoint may hold
HEADS = {
    "paper": {"num_leap_heads": 2, "leap_stride": 2, "share_lm_head": False},
    "grounded": {"leap_offsets": (2, 3), "head_context": 2, "draft_token_ids": range(0, 64, 2)},
    "path": {"leap_offsets": (2, 3), "head_context": "path", "num_head_layers": 2},
    "weighted": {"leap_offsets": (2, 3), "head_input": "weighted", "lm_head_rank": 2},
}


def tiny_model(settings: dict) -> LMTPForCausalLM:
    backbone = tiny_llama(
        64, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    backbone.config.name_or_path = "me/base"
    torch.manual_seed(8)
    model = LMTPForCausalLM.from_backbone(backbone, **settings).eval()
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.2
    model.generation_config.draft_tree = [[0], [1], [0, 0]]
    return model


@torch.no_grad()
def behaviour(model: LMTPForCausalLM) -> dict:
    """Return what must stay the same."""
    prompt = torch.tensor(PROMPT)
    options = {
        **OPTIONS,
        "attention_mask": torch.ones_like(prompt),
        "return_dict_in_generate": True,
    }
    fast = model.generate(prompt, use_lmtp=True, **options)
    leap_logits = model(prompt, output_leap_logits=True).leap_logits
    return {
        "ids": fast.sequences.tolist(),
        "plain_ids": model.generate(prompt, **options).sequences.tolist(),
        "steps": len(fast.acceptance_lengths[0]),
        "draft_tree": model.generation_config.draft_tree,
        "leap_logits": [logits[0, -1, :4].tolist() for logits in leap_logits],
    }


def main() -> None:
    folder = FIXTURES / __version__
    shutil.rmtree(folder, ignore_errors=True)
    for name, settings in HEADS.items():
        model = tiny_model(settings)
        model.save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name} heads only", heads_only=True)
        (folder / f"{name}.json").write_text(json.dumps(behaviour(model)) + "\n")
    for path in folder.rglob("*.py"):
        path.unlink()


if __name__ == "__main__":
    main()
