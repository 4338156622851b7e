"""Model cards: complete, valid for the Hub, and no number without its conditions."""

from __future__ import annotations

import json
import shutil
from typing import get_args

import pytest
from commands import lmtp
from huggingface_hub import ModelCard, metadata_load
from repositories import BASE_ID, CARD, RECORD, hub_in_use, save_backbone, save_full
from transformers import AutoConfig

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.cards import CardOptions, build_card, fill_template, write_card
from modeling_lmtp.conversion.measured import FIGURES, OF_ALL_ROWS, OF_EACH_ROW, read_measured
from modeling_lmtp.conversion.repository import Form
from modeling_lmtp.conversion.vllm_serving import CardNotes

REVISION = "0123456789abcdef0123456789abcdef01234567"
FACTS = {
    "license": "apache-2.0",
    "language": ["en"],
    "datasets": ["someone/questions"],
    "tag": "v2",
}
CONDITIONS = {
    "device": "cpu",
    "threads": 2,
    "max_new_tokens": 128,
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "leap_offsets": [2, 3],
}
ROW = {
    "prompts": "maths",
    "decoding": "tree of 8",
    "dtype": "bfloat16",
    "mode": "greedy",
    "batch_size": 1,
    "tokens_per_step": 1.8149,
    "step_cost": 1.2,
    "speed_up": {"median": 1.5124, "min": 1.1, "max": 1.9},
}
PLAIN = {**ROW, "decoding": "plain", "speed_up": None}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("cards")
    save_backbone(scratch / "base")
    save_full(scratch / "full", scratch / "base", REVISION)
    return scratch / "full"


@pytest.fixture(scope="module")
def heads(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    LMTPForCausalLM.from_pretrained(full).save_pretrained(folder, heads_only=True)
    (folder / "provenance.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture(scope="module")
def adapter(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"base_model_name_or_path": "me/full", "revision": REVISION}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    config = {"model_type": "lmtp", "leap_offsets": [2, 3]}
    record = {**RECORD, "command": "lmtp joint", "lmtp_config": config}
    (folder / "provenance.json").write_text(json.dumps(record))
    return folder


def card_of(folder, *results, **facts):
    """Return the card of a checkpoint that is published as me/model."""
    return build_card(folder, "me/model", CardOptions(**{**FACTS, **facts}, results=list(results)))


def results(folder, conditions=CONDITIONS, rows=(PLAIN, ROW)):
    path = folder / "bench.json"
    path.write_text(json.dumps({"conditions": conditions, "rows": rows}))
    return path


METADATA = {
    "full": ("transformers", BASE_ID, "finetune"),
    "heads": ("transformers", BASE_ID, "adapter"),
    "adapter": ("peft", "me/full", "adapter"),
}


@pytest.mark.parametrize("form", METADATA)
def test_each_form_has_a_complete_card(request, tmp_path, form):
    folder = request.getfixturevalue(form)
    card = card_of(folder, results(tmp_path))
    path = write_card(tmp_path, card)
    library, base, relation = METADATA[form]
    assert metadata_load(path) == {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": relation,
        "license": "apache-2.0",
        "datasets": ["someone/questions"],
        "language": ["en"],
        "tags": ["l-mtp", "multi-token-prediction", "speculative-decoding"],
    }
    text = ModelCard.load(path).text
    for part in (
        "## Use",
        "## Serve",
        "## The heads",
        "## Measured",
        "## Exactness",
        "## Limits",
        "## Citation",
    ):
        assert part in text
    assert 'repo, revision = "me/model", "v2"' in text
    assert "revision=revision" in text
    assert "| maths | tree of 8 | bfloat16 | greedy | 1 | 1.81 | 1.20 | 1.51 |" in text
    assert "cpu, 2 threads, at most 128 new tokens per prompt, torch 2.13.0" in text
    assert "| plain |" not in text
    assert "| leap offsets | 2, 3 |" in text
    assert "2505.17505" in text
    assert f"`lmtp {'joint' if form == 'adapter' else 'train'}`" in text
    opening = " ".join(text.split("## Use")[0].split())
    assert (f"pinned to revision `{REVISION}`" in opening) == (form != "full")
    assert not any(sign in text for sign in ("{{", "{%", "None", "undefined"))


def test_the_hub_accepts_a_card_and_refuses_a_bad_one(full, tmp_path):
    with hub_in_use(tmp_path):
        card_of(full).validate()
        with pytest.raises(ValueError, match="'English' must be an ISO 639"):
            card_of(full, language=["English"]).validate()


def test_the_shipped_card_is_what_the_command_writes(request, tmp_path):
    root = request.config.rootpath
    shipped = root / "hub_cards" / "smollm2-135m-instruct-lmtp"
    measured = [
        root / f"benchmarks/results/bench_planned_{kind}.json" for kind in ("bf16", "float32")
    ]
    options = CardOptions(license="apache-2.0", language=["en"], results=measured)
    card = build_card(shipped, "l-mtp/SmolLM2-135M-Instruct-lmtp", options)
    card.save(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (shipped / "README.md").read_text()
    with hub_in_use(tmp_path):
        card.validate()


VLLM = "pip install 'modeling-lmtp[vllm]'\n"
EXPORTED = (
    "lmtp export me/model OUT --to vllm\nvllm serve OUT/backbone --speculative-config "
    """'{"model": "OUT/heads", "num_speculative_tokens": 2}'\n"""
)
SERVED = {
    "full": (EXPORTED, "lmtp serve me/model\n"),
    "heads": (
        f"vllm serve {BASE_ID} --speculative-config "
        """'{"model": "me/model", "num_speculative_tokens": 2}'\n""",
        "lmtp serve me/model\n",
    ),
    # Neither server takes an adapter
    "adapter": (EXPORTED, "lmtp export me/model MERGED --to full\nlmtp serve MERGED\n"),
}


@pytest.mark.parametrize("form", METADATA)
def test_a_card_says_how_to_serve_the_repository(request, form):
    with_vllm, with_transformers = SERVED[form]
    text = card_of(request.getfixturevalue(form)).text
    assert f"```bash\n{VLLM}{with_vllm}```\n" in text
    assert f"'transformers[serving]'\n{with_transformers}```\n" in text
    assert "vLLM cannot" not in text


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"leap_offsets": [3, 5]}, "leap_offsets=(3, 5) leave out offsets, so that a draft needs"),
        ({"head_input": "weighted"}, "head_input='weighted' reads the states of all layers, of"),
    ],
    ids=["leaps", "weighted states"],
)
def test_a_card_says_why_vllm_cannot_draft(heads, tmp_path, settings, why):
    shutil.copytree(heads, tmp_path, dirs_exist_ok=True)
    config = json.loads((heads / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings}))
    text = card_of(tmp_path).text
    sentence = text.partition("vLLM cannot draft with these heads: ")[2].partition("\n")[0]
    assert sentence.startswith(why)
    assert sentence.count(".") == 1
    assert "modeling-lmtp[vllm]" not in text
    assert "lmtp serve me/model" in text


def test_a_card_without_figures_says_so(full):
    text = card_of(full).text
    assert "No measurements yet" in text
    assert "speed-up |" not in text


@pytest.mark.parametrize("name", [*OF_ALL_ROWS, *OF_EACH_ROW, *FIGURES])
def test_no_number_without_its_conditions(full, tmp_path, name):
    conditions = {key: value for key, value in CONDITIONS.items() if key != name}
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(ValueError, match=f"missing: {name}"):
        read_measured(results(tmp_path, conditions, [row]), AutoConfig.from_pretrained(full))


def test_rows_of_either_mode_are_told_apart(full, tmp_path):
    rows = [ROW, {**ROW, "mode": "sampling", "speed_up": 1.2}]
    text = card_of(full, results(tmp_path, rows=rows)).text
    assert "| maths | tree of 8 | bfloat16 | greedy | 1 | 1.81 | 1.20 | 1.51 |" in text
    assert "| maths | tree of 8 | bfloat16 | sampling | 1 | 1.81 | 1.20 | 1.20 |" in text


def test_a_card_leaves_out_other_checkpoints(full, tmp_path):
    rows = [ROW, {**ROW, "decoding": "former: tree of 8"}, {**ROW, "decoding": "plain"}]
    path = results(tmp_path, {**CONDITIONS, "against": ["former"]}, rows)
    (row,) = read_measured(path, AutoConfig.from_pretrained(full)).rows
    assert row["decoding"] == "tree of 8"


@pytest.mark.parametrize("value", ["fast", True, float("nan"), {"max": 2.0}], ids=str)
def test_a_figure_is_a_number(full, tmp_path, value):
    path = results(tmp_path, rows=[{**ROW, "speed_up": value}])
    with pytest.raises(ValueError, match="speed_up must be a number"):
        read_measured(path, AutoConfig.from_pretrained(full))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conditions": CONDITIONS, "rows": [PLAIN]}, "has no rows of figures"),
        (
            {"command": "sweep.py", "conditions": CONDITIONS, "rows": [ROW]},
            "has no rows of figures. Write it with `lmtp bench`",
        ),
        ({"conditions": {**CONDITIONS, "leap_offsets": [2, 5]}, "rows": [ROW]}, "another model"),
        ([], "must hold a JSON object, got a list"),
    ],
    ids=["only plain decoding", "another command", "another model", "no object"],
)
def test_results_that_do_not_fit_are_refused(full, tmp_path, content, message):
    (tmp_path / "bench.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        card_of(full, tmp_path / "bench.json")


VALUES = {
    "repo_id": "me/model",
    "tag": "v1",
    "base_model": "me/base",
    "base_revision": REVISION,
    "requires": "torch",
    "tested": "5.15 to 5.24",
    "vllm": CardNotes(["vllm serve me/base"], ""),
    "heads": [("leap offsets", "2, 3")],
    "measured": [],
    "training": [("command", "lmtp train")],
}


@pytest.mark.parametrize("form", get_args(Form))
@pytest.mark.parametrize("value", [None, "", ...], ids=["None", "empty", "not given"])
@pytest.mark.parametrize("name", VALUES)
def test_a_placeholder_without_a_value_is_an_error(form, name, value):
    if name == "base_revision" and form == "full":
        pytest.skip("its card needs none")
    values = {key: text for key, text in {**VALUES, name: value}.items() if text is not ...}
    with pytest.raises(ValueError, match=f"placeholder without a value: '{name}'"):
        fill_template(form, values)


def test_the_record_of_training_is_needed(full, tmp_path):
    (tmp_path / "config.json").write_bytes((full / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no provenance\.json"):
        card_of(tmp_path)


def lmtp_card(folder, *options):
    return lmtp("publish", folder, "me/model", "--card_only", *options, *CARD)


def test_the_command_writes_the_card(full, tmp_path):
    result = lmtp_card(full, "--results", results(tmp_path))
    assert result.exit_code == 0, result.output
    assert metadata_load(full / "README.md")["base_model"] == BASE_ID
    assert not list(full.glob(".*"))


def test_a_card_that_cannot_be_written_leaves_the_old_one(full, monkeypatch):
    (full / "README.md").write_text("old")

    def fail(self, path):
        path.write_text("half")
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(ModelCard, "save", fail)
    result = lmtp_card(full)
    assert result.exit_code == 1
    assert "error: [Errno 13] Permission denied" in result.output
    assert (full / "README.md").read_text() == "old"
    assert not list(full.glob(".*"))


@pytest.mark.parametrize("form", METADATA)
def test_figures_of_heads_on_another_model_are_refused(request, tmp_path, form):
    folder = request.getfixturevalue(form)
    path = results(tmp_path, {**CONDITIONS, "base_model": "someone/another"})
    if form == "adapter":  # whose record of the heads names no backbone here
        card_of(folder, path)
        return
    with pytest.raises(ValueError, match="is about another model: heads on another instead of "):
        card_of(folder, path)
    copied = results(tmp_path, {**CONDITIONS, "base_model": BASE_ID.split("/")[-1]})
    card_of(folder, copied)
