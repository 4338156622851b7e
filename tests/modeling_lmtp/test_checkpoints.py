"""A saved model loads with Transformers alone, complete or not at all."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny_causal_lm
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import modeling_lmtp
from modeling_lmtp import LMTPConfig, LMTPForCausalLM

PROMPT = torch.tensor([[3, 17, 5, 9, 44]])
PACKAGE = Path(modeling_lmtp.__file__).parent
DRAFT_TREE = [[0], [1], [0, 0]]

# name: (architecture, settings of the heads, dtype, arguments of save_pretrained)
SAVED = {
    "llama": ("llama", {}, torch.float32, {}),
    "llama tied": ("llama_tied", {"share_lm_head": False}, torch.float32, {}),
    "gpt2": ("gpt2", {"leap_offsets": (2, 3, 5)}, torch.float32, {}),
    "sharded": ("llama", {"num_head_layers": 2}, torch.float32, {"max_shard_size": "20KB"}),
    "bf16": ("llama", {}, torch.bfloat16, {}),
    "mistral": ("mistral", {"train_backbone": True}, torch.float32, {}),
    "path-grounded": ("llama", {"head_context": "path"}, torch.float32, {}),
    "weighted": ("gpt2", {"head_input": "weighted", "head_context": 1}, torch.float32, {}),
    "low rank": (
        "llama_tied",
        {"lm_head_rank": 3, "draft_token_ids": tuple(range(0, 96, 3))},
        torch.float32,
        {},
    ),
}

# A consumer: only Transformers, no modeling_lmtp. Loads folders, saves each again beside it.
CONSUMER = """
import json, sys
import torch

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "modeling_lmtp" or name.startswith("modeling_lmtp."):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Block())
try:
    import modeling_lmtp
except ImportError:
    pass
else:
    raise SystemExit("modeling_lmtp can be imported")
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

prompt = torch.tensor([[3, 17, 5, 9, 44]])
results = {}
for folder in json.loads(sys.argv[1]):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(prompt, output_leap_logits=True)
        base_logits = base(prompt).logits
    options = dict(
        attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12
    )
    results[folder] = dict(
        logits=outputs.logits,
        leap_logits=outputs.leap_logits,
        base_logits=base_logits,
        config=(config.model_type, config.leap_offsets, config.share_lm_head),
        modules=[type(thing).__module__ for thing in (config, base, model)],
        plain=model.generate(prompt, use_lmtp=False, **options).tolist(),
        leaping=model.generate(prompt, use_lmtp=True, **options).tolist(),
        settings=[getattr(model.generation_config, s, None) for s in ("use_lmtp", "draft_tree")],
        dtypes={str(parameter.dtype) for parameter in model.parameters()},
        trained={name for name, p in model.named_parameters() if p.requires_grad},
    )
    model.save_pretrained(folder + " again")
torch.save(results, sys.argv[2])
"""


def consume(folders: list[Path], scratch: Path) -> dict[str, dict]:
    """Run the consumer in a fresh process, with no module of an earlier one in its cache."""
    scratch.mkdir()
    subprocess.run(
        [sys.executable, "-c", CONSUMER, json.dumps([str(f) for f in folders]), scratch / "out.pt"],
        env={**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=scratch,
        check=True,
    )
    return torch.load(scratch / "out.pt")


def wrapped(name: str) -> LMTPForCausalLM:
    architecture, settings, dtype, _ = SAVED[name]
    torch.manual_seed(8)  # not every weight of a new head is zero
    model = LMTPForCausalLM.from_backbone(tiny_causal_lm(architecture, dtype=dtype), **settings)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    model.generation_config.use_lmtp = True
    model.generation_config.draft_tree = DRAFT_TREE
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds one checkpoint per entry of `SAVED`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (_, _, _, arguments) in SAVED.items():
        wrapped(name).save_pretrained(folder / name, **arguments)
    return folder


@pytest.fixture(scope="module")
def consumed(folder) -> dict[str, dict]:
    """What consumers found: first in the checkpoints, then in those saved by the first consumer."""
    first = consume([folder / name for name in SAVED], folder / "first")
    second = consume([folder / f"{name} again" for name in SAVED], folder / "second")
    return {Path(path).name: result for path, result in {**first, **second}.items()}


@pytest.mark.parametrize("again", ["", " again"], ids=["saved", "saved again by a consumer"])
@pytest.mark.parametrize("name", SAVED)
def test_remote_code_gives_the_saved_model(consumed, name, again):
    found, model = consumed[name + again], wrapped(name)
    with torch.no_grad():
        expected = model(PROMPT, output_leap_logits=True)
    torch.testing.assert_close(found["logits"], expected.logits)
    torch.testing.assert_close(found["base_logits"], expected.logits)
    torch.testing.assert_close(found["leap_logits"], expected.leap_logits)
    config = model.config
    assert found["config"] == ("lmtp", config.leap_offsets, config.share_lm_head)
    assert all(module.startswith("transformers_modules.") for module in found["modules"])
    assert found["dtypes"] == {str(SAVED[name][2])}


@pytest.mark.parametrize("again", ["", " again"], ids=["saved", "saved again by a consumer"])
@pytest.mark.parametrize("name", [name for name in SAVED if name != "bf16"])  # near-ties
def test_remote_code_decodes_as_plain_decoding_does(consumed, name, again):
    found = consumed[name + again]
    assert found["leaping"] == found["plain"]
    assert len(found["plain"][0]) == PROMPT.shape[1] + 12


@pytest.mark.parametrize("again", ["", " again"], ids=["saved", "saved again by a consumer"])
@pytest.mark.parametrize("name", SAVED)
def test_settings_of_decoding_are_saved_with_the_model(consumed, name, again):
    assert consumed[name + again]["settings"] == [True, DRAFT_TREE]


@pytest.mark.parametrize("again", ["", " again"], ids=["saved", "saved again by a consumer"])
@pytest.mark.parametrize("name", SAVED)
def test_remote_code_trains_what_the_saved_model_trains(consumed, name, again):
    trained = {name for name, p in wrapped(name).named_parameters() if p.requires_grad}
    assert consumed[name + again]["trained"] == trained


def test_small_shards_are_really_shards(folder):
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, LMTPForCausalLM])
@pytest.mark.parametrize("name", SAVED)
def test_the_installed_package_loads_its_own_checkpoints(folder, name, auto_class):
    model = auto_class.from_pretrained(folder / name)
    assert type(model) is LMTPForCausalLM
    assert type(AutoConfig.from_pretrained(folder / name)) is LMTPConfig
    saved = wrapped(name).state_dict()
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), (torch.float32, torch.float32), ("float16", torch.float16)],
    ids=str,
)
def test_the_dtype_asked_for_is_given(folder, dtype, expected):
    model = LMTPForCausalLM.from_pretrained(folder / "bf16", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model(PROMPT, output_leap_logits=True).leap_logits[0].dtype == expected


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_asked_for_is_the_backbone_s(folder, implementation):
    model = LMTPForCausalLM.from_pretrained(folder / "llama", attn_implementation=implementation)
    assert model.backbone.config._attn_implementation == implementation


def test_a_frozen_backbone_is_frozen_after_loading(folder):
    frozen = LMTPForCausalLM.from_pretrained(folder / "llama")
    assert not any(parameter.requires_grad for parameter in frozen.backbone.parameters())
    assert all(parameter.requires_grad for parameter in frozen.leap_heads.parameters())
    trained = LMTPForCausalLM.from_pretrained(folder / "mistral")
    assert all(parameter.requires_grad for parameter in trained.parameters())


WEIGHT = "leap_heads.1.blocks.0.linear.weight"
DAMAGES = {
    "missing": (lambda tensors: tensors.pop(WEIGHT), rf"{WEIGHT}: missing"),
    "missing in the backbone": (
        lambda tensors: tensors.pop("backbone.model.norm.weight"),
        r"backbone\.model\.norm\.weight: missing",
    ),
    "extra": (
        lambda tensors: tensors.update({"leap_heads.3.lm_head.weight": torch.ones(2)}),
        r"leap_heads\.3\.lm_head\.weight: not part of the configured model",
    ),
    "wrong shape": (lambda tensors: tensors.update({WEIGHT: torch.ones(2, 2)}), WEIGHT),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_an_incomplete_checkpoint_is_refused_by_the_names_of_its_tensors(tmp_path, damage, message):
    wrapped("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        LMTPForCausalLM.from_pretrained(tmp_path)


def test_loading_information_is_still_given(folder):
    model, info = LMTPForCausalLM.from_pretrained(folder / "llama", output_loading_info=True)
    assert isinstance(model, LMTPForCausalLM)
    assert not info["missing_keys"]


SHIPPED = sorted(PACKAGE.glob("*_lmtp.py"))


def test_a_checkpoint_holds_all_the_code_and_nothing_else(folder):
    for name in [*SAVED, *(f"{name} again" for name in SAVED)]:
        if not (folder / name).exists():
            continue  # the consumers have not run
        saved = {path.name: path.read_text() for path in (folder / name).glob("*.py")}
        assert saved == {path.name: path.read_text() for path in SHIPPED}
        suffixes = {path.suffix for path in (folder / name).iterdir()}
        assert suffixes == {".py", ".json", ".safetensors"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_code_imports_only_what_a_consumer_has(path):
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
    names = {file.stem for file in SHIPPED}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                assert node.module.split(".")[0] in allowed
            else:  # `from .name_lmtp import x`, flat
                assert node.level == 1
                assert node.module in names


def test_where_the_backbone_lay_is_not_told(tmp_path):
    tiny_causal_lm("llama").save_pretrained(tmp_path / "own_folder")
    model = LMTPForCausalLM.from_backbone(tmp_path / "own_folder")
    model.config.base_model_name_or_path = "owner/model"
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.json"):
        assert "own_folder" not in path.read_text(), path.name
    loaded = LMTPForCausalLM.from_pretrained(tmp_path / "saved")
    loaded.save_pretrained(tmp_path / "again")
    assert "saved" not in (tmp_path / "again" / "config.json").read_text()


def test_a_backbone_that_nothing_could_load_is_refused(tmp_path):
    class OwnConfig(LlamaConfig):
        model_type = "of_its_own"

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LMTPForCausalLM.from_backbone(OwnModel(OwnConfig(vocab_size=96, **sizes)))
    with pytest.raises(
        ValueError, match="Transformers does not know the backbone's architecture 'of_its_own'"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
