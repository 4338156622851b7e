"""A Transformers of tomorrow, in which one name is another, never breaks a program.

Each future is a copy of the installed Transformers in which one name has been changed everywhere, so that
plain decoding works as ever. A checkpoint is loaded there as remote code, in a fresh process, and must give
plain decoding's text: with drafts, or without and with a warning that says why.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
from architectures import tiny_causal_lm
from transformers import GenerationMixin

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.transformers_lmtp import CACHE_NAMES, RELEASE, REMEDY, forward_parameters

pytestmark = pytest.mark.slow  # a fresh process for each name: minutes

INSTALLED = Path(transformers.__file__).parent
ARCHITECTURES = ("llama", "mistral", "qwen3_next")  # keys and values, windows, recurrent states
CACHE = next(name for name in CACHE_NAMES if name in forward_parameters(tiny_causal_lm("llama")))
ANY_FILE = "**/*.py"
# The files in which the plain words for the cache, and for its keys, mean nothing else
OF_THE_CACHE = (
    "generation/utils.py",
    "masking_utils.py",
    "modeling_outputs.py",
    "utils/generic.py",
    *(f"models/{name}/modeling_{name}.py" for name in ARCHITECTURES),
)


# Names that decoding goes without, where they are not there
DONE_WITHOUT = (
    *("_sample", "_update_model_kwargs_for_generation", "_optimize_model_for_decode"),
    *("_valid_auto_compile_criteria", "_pad_token_tensor", "_mask_length", "_from_model_config"),
    *("_no_split_modules", "EtaLogitsWarper"),
)


@dataclass(frozen=True)
class Future:
    """What is different.

    Args:
        changes: patterns and what takes their place.
        files: where.
        needed: whether decoding with drafts needs the name: then it decodes plainly, at least somewhere.
    """

    changes: dict[str, str]
    files: tuple[str, ...] = (ANY_FILE,)
    needed: bool = True


def renamed(name: str) -> Future:
    return Future({rf"\b{name}\b": f"{name}_of_tomorrow"})


def in_layers(name: str) -> Future:
    """An attribute of cache layers, whose name is another word elsewhere."""
    return Future({rf"(?<=\.){name}\b(?!\()": f"the_{name}"}, ("cache_utils.py",))


FUTURES = {
    "the cache": Future({rf"(?<!continuous_batching\.)\b{CACHE}\b": "kv_store"}, OF_THE_CACHE),
    "custom_generate": Future({r"\bcustom_generate\b": "decoding_loop"}, ("generation/utils.py",)),
    "next_sequence_length": renamed("next_sequence_length"),
    "_prefill": renamed("_prefill"),
    "a parameter of _prefill": Future(
        {
            r"(def _prefill\(\s*self[^,]*,\s*)input_ids": r"\1schedule, input_ids",
            r"(\._prefill\(\s*)input_ids": r"\1None, input_ids",
        },
        ("generation/utils.py",),
    ),
    "create_masks_for_generate": renamed("create_masks_for_generate"),
    "_attn_implementation": renamed("_attn_implementation"),
    "DynamicLayer": renamed("DynamicLayer"),
    "DynamicSlidingWindowLayer": renamed("DynamicSlidingWindowLayer"),
    "LinearAttentionCacheLayerMixin": renamed("LinearAttentionCacheLayerMixin"),
    "StaticLayer": renamed("StaticLayer"),
    "keys of a layer": Future(
        {r"\b(self|layer)\.keys\b(?!\()": r"\1.k_states"}, ("cache_utils.py",)
    ),
    "values of a layer": Future(
        {r"\b(self|layer)\.values\b(?!\()": r"\1.v_states"}, ("cache_utils.py",)
    ),
    "cumulative_length": renamed("cumulative_length"),
    "record_past": renamed("record_past"),
    "activate_past_recording": renamed("activate_past_recording"),
    "crop": Future({r"\bcrop\(": "cut_off("}, ("cache_utils.py", "generation/utils.py")),
    "reorder_cache": renamed("reorder_cache"),
    "is_sliding": renamed("is_sliding"),
    "get_mask_sizes": renamed("get_mask_sizes"),
    "conv_states": in_layers("conv_states"),
    "recurrent_states": in_layers("recurrent_states"),
    "is_recurrent_states_initialized": renamed("is_recurrent_states_initialized"),
    "what is done without": Future(
        {rf"\b{name}\b": f"{name}_" for name in DONE_WITHOUT}, needed=False
    ),
    "nothing": Future({}, needed=False),
}

CONSUMER = """
import json, logging, sys
sys.modules["modeling_lmtp"] = None  # importing the package now fails
import torch
from transformers import AutoModelForCausalLM
import transformers
assert sys.argv[2] in transformers.__file__, transformers.__file__
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
for name in ("transformers", "transformers_modules"):
    logging.getLogger(name).addHandler(handler)
prompts = torch.tensor([[3, 17, 5, 9, 44], [0, 0, 7, 8, 21]])
batch = dict(inputs=prompts, attention_mask=(prompts != 0).long())
found = {}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    options = dict(do_sample=False, max_new_tokens=12, pad_token_id=0)
    said.clear()
    equal, passes = [], []
    for inputs in ({"inputs": prompts[:1]}, batch):
        for draft in ({"draft_length": 3}, {"draft_tree": [[0], [1], [0, 0]]}):
            plain = model.generate(**inputs, **options)
            output = model.generate(
                **inputs, **options, **draft, use_lmtp=True, return_dict_in_generate=True
            )
            equal.append(output.sequences.tolist() == plain.tolist())
            passes.append(max(map(len, output.acceptance_lengths)))
    plainly = [line for line in said if "use_lmtp=True decodes plainly here" in line]
    chains = [line for line in said if "cannot verify a draft tree exactly" in line]
    others = [line for line in said if "deprecated" in line]
    found[folder] = dict(equal=equal, passes=passes, plainly=plainly, chains=chains, old=others)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Save a checkpoint of each architecture; return their folders by name."""
    folders = {}
    for architecture in ARCHITECTURES:
        model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture), leap_offsets=(2, 3, 4))
        folders[architecture] = str(tmp_path_factory.mktemp("checkpoints") / architecture)
        model.save_pretrained(folders[architecture])
    return folders


def install(future: Future, place: Path) -> None:
    """Lay out a Transformers that is `future`: links to the installed files, but for those that differ."""
    changed = {}
    for pattern in future.files:
        for path in INSTALLED.glob(pattern):
            text = source = path.read_text()
            for old, new in future.changes.items():
                text = re.sub(old, new, text)
            if text != source:
                changed[path.relative_to(INSTALLED)] = text
    assert bool(changed) == bool(future.changes), "this release has no such name"
    folders = {parent for path in changed for parent in path.parents}
    target = place / "transformers"
    for folder in sorted(folders | {Path()}):
        (target / folder).mkdir(parents=True)
        for path in (INSTALLED / folder).iterdir():
            name = path.relative_to(INSTALLED)
            if path.name != "__pycache__" and name not in changed and name not in folders:
                (target / name).symlink_to(path)
    for name, text in changed.items():
        (target / name).write_text(text)


@pytest.mark.parametrize("name", FUTURES)
def test_a_checkpoint_gives_plain_text_in_a_release_with_other_names(name, checkpoints, tmp_path):
    future = FUTURES[name]
    install(future, tmp_path)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CONSUMER, json.dumps(list(checkpoints.values())), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    does = {}
    for architecture, folder in checkpoints.items():
        result = found[folder]
        assert all(result["equal"]), (architecture, result)
        assert not result["old"]
        assert len(result["plainly"]) <= 1
        does[architecture] = (
            "plain" if result["plainly"] else "chain" if result["chains"] else "tree"
        )
        if result["plainly"]:
            assert RELEASE in result["plainly"][0]
            assert REMEDY in result["plainly"][0]
            assert all(passes == 11 for passes in result["passes"]), "a pass for each token"
    today = dict(zip(ARCHITECTURES, ("tree", "tree", "chain"), strict=True))
    print(f"{name:40} {does}")
    assert (does != today) == future.needed, (does, found)


def test_the_names_are_those_of_the_file_that_knows_them():
    source = (Path(__file__).parents[2] / "modeling_lmtp" / "transformers_lmtp.py").read_text()
    private = {
        name for name in re.findall(r'[."](_[a-z]\w+)\b', source) if hasattr(GenerationMixin, name)
    }
    assert private <= {*FUTURES, *DONE_WITHOUT}
