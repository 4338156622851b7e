"""Loads a checkpoint as its users will: in a fresh process, as remote code, without this package."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SCRIPT = """
import json, sys
sys.modules["modeling_lmtp"] = None  # importing the package now fails
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
path, output, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(asked["threads"])
base = asked["base"]
input_ids = torch.tensor([asked["prompt_ids"]])
if asked["form"] == "adapter":
    from peft import AutoPeftModelForCausalLM, PeftModel
    if base is None:
        model = AutoPeftModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
        model = PeftModel.from_pretrained(model, path)
    code = type(model.get_base_model())
else:
    given = {} if base is None else {"backbone": base}
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "lmtp"
    model = AutoModel.from_pretrained(path, trust_remote_code=True, **given)
    with torch.no_grad():
        by_auto_model = model(input_ids).logits
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **given)
    code = type(model)
assert code.__module__.startswith("transformers_modules"), code.__module__
model.eval()
options = dict(attention_mask=torch.ones_like(input_ids), max_new_tokens=asked["max_new_tokens"])
options |= dict(do_sample=False, return_dict_in_generate=True)
with torch.no_grad():
    outputs = model(input_ids, output_leap_logits=True)
    ids = model.generate(input_ids=input_ids, use_lmtp=False, **options).sequences
if asked["form"] != "adapter":
    assert torch.equal(by_auto_model, outputs.logits), "AutoModel gives other logits"
leap_logits = {f"leap_logits.{i}": part for i, part in enumerate(outputs.leap_logits)}
save_file({"logits": outputs.logits, **leap_logits}, output)
model.float()  # where both ways of decoding must be equal
plain = model.generate(input_ids=input_ids, use_lmtp=False, **options)
lmtp = model.generate(input_ids=input_ids, use_lmtp=True, **options)
start = input_ids.shape[1]
print(json.dumps({
    "ids": ids[0, start:].tolist(),
    "plain_ids": plain.sequences[0, start:].tolist(),
    "lmtp_ids": lmtp.sequences[0, start:].tolist(),
    "acceptance_lengths": lmtp.acceptance_lengths[0],
}))
"""


def generate_as_remote_code(
    checkpoint: Path,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    form: str = "full",
    base: str | None = None,
) -> dict[str, Any]:
    """Generate greedily, plainly and with L-MTP, from a checkpoint's own code in a fresh process.

    Args:
        checkpoint: a folder.
        prompt_ids: token ids of one prompt.
        max_new_tokens: passed to `generate`.
        form: `"full"`, `"heads"` or `"adapter"`; each loads through its own Auto classes.
        base: a folder with the base model of heads or an adapter, in place of the one they name.

    Returns:
        In float32, where both must be equal: `plain_ids`, `lmtp_ids` (the new tokens) and
        `acceptance_lengths`. In the checkpoint's dtype: plain decoding's `ids`, and `tensors` with the
        prompt's `logits` `(1, L, V)` and the `leap_logits.{i}` of each head.

    Raises:
        RuntimeError: the process failed; the message ends with its error output.
    """
    asked = {
        "form": form,
        "base": base,
        "prompt_ids": prompt_ids,
        "max_new_tokens": max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / "logits.safetensors"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(checkpoint), str(tensors), json.dumps(asked)],
            capture_output=True,
            text=True,
            check=False,
            # Transformers caches a copy of remote code; delete it with the scratch folder
            env={**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules")},
        )
        if done.returncode:
            raise RuntimeError(
                f"{checkpoint} does not load as remote code in a fresh process:\n{done.stderr[-2000:]}"
            )
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**result, "tensors": load_file(tensors)}
