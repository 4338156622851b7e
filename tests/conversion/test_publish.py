"""`lmtp publish`: over HTTP to a Hub, and back in a fresh process without this package."""

from __future__ import annotations

import json
import re

import pytest
import torch
from commands import lmtp
from peft import PeftModel
from repositories import (
    ADAPTER_ID,
    BASE_ID,
    CARD,
    FULL_ID,
    HEADS_ID,
    code_of,
    files_of,
    hub_in_use,
    run_without_package,
    save_adapter,
    save_backbone,
    save_full,
)

from modeling_lmtp import LMTPForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # How huggingface_hub uploads
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
PROMPT = [[3, 17, 5, 9, 44]]
CONSUMER = """
import torch
from transformers import AutoConfig, AutoModel
prompt, results = torch.tensor(arguments["prompt"]), {}
for repo, code in arguments["cards"].items():
    names = {}
    exec(code, names)
    model = names["model"]
    options = dict(input_ids=prompt, max_new_tokens=12, do_sample=False)
    results[repo] = dict(
        logits=model(prompt).logits.detach(),
        plain=model.generate(**options, use_lmtp=False).tolist(),
        leaping=model.generate(**options, use_lmtp=True).tolist(),
    )
    if "adapter" not in repo:
        pinned = dict(revision="v1", code_revision="v1", trust_remote_code=True)
        results[repo]["type"] = AutoConfig.from_pretrained(repo, **pinned).model_type
        results[repo]["base"] = AutoModel.from_pretrained(repo, **pinned)(prompt).logits.detach()
torch.save(results, output)
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def hub(scratch):
    with hub_in_use(scratch) as hub:
        yield hub


@pytest.fixture(scope="module")
def published(scratch, hub):
    """All three forms on the Hub; holds what `lmtp publish` printed for each."""
    save_backbone(scratch / "base")
    revision = hub.add(BASE_ID, files_of(scratch / "base"))
    save_full(scratch / "full", scratch / "base", revision)
    save_adapter(scratch / "adapter", scratch / "full")
    printed = {}
    for form, repo, base in (("full", FULL_ID, "base"), ("heads", HEADS_ID, "base")):
        result = lmtp(
            *("publish", scratch / "full", repo, *CARD, "--form", form, "--yes"),
            *("--base-folder", scratch / base),
        )
        assert result.exit_code == 0, result.output
        printed[repo] = result.output
    commit = hub.repos[FULL_ID].branches["main"]
    result = lmtp(
        *("publish", scratch / "adapter", ADAPTER_ID, *CARD, "--private", "--yes"),
        *("--base-model", FULL_ID, "--base-revision", commit, "--base-folder", scratch / "full"),
    )
    assert result.exit_code == 0, result.output
    printed[ADAPTER_ID] = result.output
    return printed


def test_one_tagged_commit_holds_everything(published, hub):
    for repo in (FULL_ID, HEADS_ID, ADAPTER_ID):
        assert len(hub.repos[repo].commits) == 2  # the Hub's own, and this
        assert hub.repos[repo].tags == {"v1": hub.repos[repo].branches["main"]}
        assert hub.repos[repo].tags["v1"] in published[repo]
        wanted = {"README.md", "provenance.json", "tokenizer.json", ".gitattributes"}
        assert wanted <= hub.files(repo).keys()
    code = {"modeling_lmtp.py", "configuration_lmtp.py", "generation_config.json", "config.json"}
    assert code <= hub.files(FULL_ID).keys()
    assert hub.files(FULL_ID).keys() == hub.files(HEADS_ID).keys()


def test_only_what_is_asked_to_be_private_is(published, hub):
    assert [hub.repos[repo].private for repo in (FULL_ID, HEADS_ID, ADAPTER_ID)] == [0, 0, 1]


def test_files_and_sizes_are_shown(published, hub):
    for name, data in hub.files(FULL_ID).items():
        if name != ".gitattributes":
            assert re.search(rf"{re.escape(name)}\W+{len(data):,}\b", published[FULL_ID])


def test_no_path_of_this_machine_is_published(published, hub, scratch):
    for repo in (FULL_ID, HEADS_ID, ADAPTER_ID):
        for name, data in hub.files(repo).items():
            assert str(scratch).encode() not in data, name


def test_heads_and_adapter_pin_their_base_model(published, hub):
    heads = json.loads(hub.files(HEADS_ID)["config.json"])
    assert heads["base_model_name_or_path"] == BASE_ID
    assert heads["base_model_revision"] == hub.repos[BASE_ID].branches["main"]
    adapter = json.loads(hub.files(ADAPTER_ID)["adapter_config.json"])
    assert adapter["base_model_name_or_path"] == FULL_ID
    assert adapter["revision"] == hub.repos[FULL_ID].branches["main"]


def test_the_record_travels_along_with_hashes(published, hub):
    for repo in (FULL_ID, HEADS_ID, ADAPTER_ID):
        record = json.loads(hub.files(repo)["provenance.json"])
        assert record["examples"] == 4
        assert len(record["publication"]["sha256"]) == 1


@pytest.mark.slow
def test_the_cards_code_runs_as_pasted_and_gives_the_model(published, hub, scratch):
    repos = (FULL_ID, HEADS_ID, ADAPTER_ID)
    cards = {repo: code_of(hub.files(repo)["README.md"].decode()) for repo in repos}
    found = run_without_package(CONSUMER, {"prompt": PROMPT, "cards": cards}, scratch)
    model = LMTPForCausalLM.from_pretrained(scratch / "full")
    prompt = torch.tensor(PROMPT)
    with torch.no_grad():
        expected = {repo: model(prompt).logits for repo in (FULL_ID, HEADS_ID)}
        adapted = PeftModel.from_pretrained(model, scratch / "adapter").eval()
        expected[ADAPTER_ID] = adapted(input_ids=prompt).logits
    for repo in repos:
        torch.testing.assert_close(found[repo]["logits"], expected[repo])
        assert found[repo]["leaping"] == found[repo]["plain"]
        if repo != ADAPTER_ID:
            assert found[repo]["type"] == "lmtp"
            assert torch.equal(found[repo]["base"], found[repo]["logits"])


def test_push_to_hub_sends_code_and_weights_in_one_commit(published, hub, scratch, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    LMTPForCausalLM.from_pretrained(scratch / "full").push_to_hub("me/pushed")
    assert len(hub.repos["me/pushed"].commits) == 2
    pushed, wanted = hub.files("me/pushed"), hub.files(FULL_ID)
    for name in (name for name in wanted if name.endswith((".py", ".safetensors"))):
        assert pushed[name] == wanted[name], name
    auto_maps = [json.loads(files["config.json"])["auto_map"] for files in (pushed, wanted)]
    assert auto_maps[0] == auto_maps[1]
    assert b"l-mtp" in pushed["README.md"]
