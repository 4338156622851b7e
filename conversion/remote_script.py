"""Runs in a fresh process, see `remote_check`: loads a checkpoint with its own code and generates.

Usage: CHECKPOINT TENSORS TASK. Logits go into the file TENSORS, token ids to stdout as JSON.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def load(path: str, form: str, base: str | None) -> tuple[Any, type]:
    """Load a checkpoint as its users do; return the model and the class of its code."""
    if form == "adapter":
        from peft import AutoPeftModelForCausalLM, PeftModel

        if base is None:
            model = AutoPeftModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
            model = PeftModel.from_pretrained(model, path)
        return model, type(model.get_base_model())
    given = {} if base is None else {"backbone": base}
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **given)
    return model, type(model)


@torch.no_grad()
def check_auto_classes(path: str, base: str | None, input_ids: Any, logits: torch.Tensor) -> None:
    """Check that AutoConfig and AutoModel load the same model."""
    given = {} if base is None else {"backbone": base}
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "lmtp"
    model = AutoModel.from_pretrained(path, trust_remote_code=True, **given)
    assert torch.equal(model(input_ids).logits, logits), "AutoModel gives other logits"


@torch.no_grad()
def main(path: str, output: str, task: dict[str, Any]) -> None:
    """Load, generate, and write the results."""
    torch.set_num_threads(task["threads"])
    input_ids = torch.tensor([task["prompt_ids"]])
    model, code = load(path, task["form"], task["base"])
    assert code.__module__.startswith("transformers_modules"), code.__module__
    model.eval()
    outputs = model(input_ids, output_leap_logits=True)
    if task["form"] != "adapter":
        check_auto_classes(path, task["base"], input_ids, outputs.logits)
    leap_logits = {f"leap_logits.{i}": part for i, part in enumerate(outputs.leap_logits)}
    save_file({"logits": outputs.logits, **leap_logits}, output)

    options = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": task["max_new_tokens"],
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    ids = model.generate(use_lmtp=False, **options).sequences
    model.float()  # in float32 both ways of decoding must agree
    plain = model.generate(use_lmtp=False, **options)
    lmtp = model.generate(use_lmtp=True, **options)
    start = input_ids.shape[1]
    results = {
        "ids": ids[0, start:].tolist(),
        "plain_ids": plain.sequences[0, start:].tolist(),
        "lmtp_ids": lmtp.sequences[0, start:].tolist(),
        "acceptance_lengths": lmtp.acceptance_lengths[0],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    sys.modules["modeling_lmtp"] = None  # type: ignore[assignment]  # importing the package now fails
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
