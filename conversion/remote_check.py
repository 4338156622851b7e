"""Load a checkpoint as its users will: in a fresh process, as remote code, without this package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
sys.modules["modeling_lmtp"] = None  # importing the package now fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
path, prompt_ids, max_new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "lmtp"
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
assert type(model).__module__.startswith("transformers_modules")
input_ids = torch.tensor([prompt_ids])
options = dict(attention_mask=torch.ones_like(input_ids), max_new_tokens=max_new_tokens)
options |= dict(do_sample=False, return_dict_in_generate=True)
plain = model.generate(input_ids, **options)
lmtp = model.generate(input_ids, use_lmtp=True, **options)
print(json.dumps({
    "plain_ids": plain.sequences[0, len(prompt_ids):].tolist(),
    "lmtp_ids": lmtp.sequences[0, len(prompt_ids):].tolist(),
    "acceptance_lengths": lmtp.acceptance_lengths[0],
}))
"""


def generate_as_remote_code(
    checkpoint: Path, prompt_ids: list[int], max_new_tokens: int
) -> dict[str, Any]:
    """Generate greedily, plainly and with L-MTP, from a checkpoint's own code in a fresh process.

    In float32, where both must be equal.

    Returns:
        `plain_ids`, `lmtp_ids` (the new tokens) and `acceptance_lengths`.

    Raises:
        RuntimeError: the process failed; the message ends with its error output.
    """
    arguments = [str(checkpoint), json.dumps(prompt_ids), str(max_new_tokens)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{checkpoint} does not load as remote code in a fresh process:\n{done.stderr[-2000:]}"
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
