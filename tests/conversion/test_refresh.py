"""`lmtp refresh`: this version's code in a published checkpoint, and nothing else changed there."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from commands import error_of, lmtp
from hub_server import TOKEN, error
from repositories import (
    ADAPTER_ID,
    BASE_ID,
    CARD,
    FULL_ID,
    HEADS_ID,
    files_of,
    hub_in_use,
    run_without_package,
    save_adapter,
    save_backbone,
    save_full,
)
from save_fixture import FIXTURES, HEADS, OPTIONS, PROMPT
from transformers import AutoModelForCausalLM

from modeling_lmtp import LMTPForCausalLM, __version__
from modeling_lmtp.conversion import refreshing
from modeling_lmtp.pretrained_lmtp import AUTO_MAP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # How huggingface_hub uploads
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
CHECK = "modeling_lmtp.conversion.{}.check_repository"
OLD_CODE = b"raise ImportError('code of long ago')\n"
NOT_OURS = {"handler.py": b"import json\n", "notes.txt": b"mine"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files of freshly published repositories by id, of their base model, and of an adapter."""
    scratch = tmp_path_factory.mktemp("published")
    with hub_in_use(scratch) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHECK.format("publishing"), lambda *arguments: None)
        save_backbone(scratch / "base")
        revision = hub.add(BASE_ID, files_of(scratch / "base"))
        save_full(scratch / "full", scratch / "base", revision)
        save_adapter(scratch / "adapter", scratch / "full")
        for form, repo in (("full", FULL_ID), ("heads", HEADS_ID)):
            options = ("--form", form, "--base-folder", scratch / "base", "--yes")
            result = lmtp("publish", scratch / "full", repo, *CARD, *options)
            assert result.exit_code == 0, result.output
        own = {repo: dict(hub.files(repo)) for repo in (BASE_ID, FULL_ID, HEADS_ID)}
        return {**own, ADAPTER_ID: files_of(scratch / "adapter")}


@pytest.fixture
def hub(tmp_path, published):
    with hub_in_use(tmp_path) as hub:
        hub.add(BASE_ID, published[BASE_ID])
        yield hub


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """Holds the arguments of each check in a clean process, which does not happen: it takes seconds."""
    checked = []
    monkeypatch.setattr(CHECK.format("refreshing"), lambda *arguments: checked.append(arguments))
    return checked


def aged(files, **settings):
    """Return files with code that is partly old, partly missing and partly given up since."""
    config = {**json.loads(files["config.json"]), **settings}
    changed = {
        "tree_lmtp.py": OLD_CODE,
        "modeling_lmtp.py": OLD_CODE,
        "given_up_lmtp.py": OLD_CODE,
        **({"config.json": json.dumps(config).encode()} if settings else {}),
    }
    kept = {name: data for name, data in files.items() if name != "unembeddings_lmtp.py"}
    return {**kept, **changed, **NOT_OURS}


CHANGES = {
    "given_up_lmtp.py": "removed",
    "modeling_lmtp.py": "replaced",
    "tree_lmtp.py": "replaced",
    "unembeddings_lmtp.py": "added",
}


def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def text_of(*arguments):
    result = lmtp("refresh", *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(params=["folder", "repository"])
def place(request, hub, tmp_path):
    """Return a function that puts files into a folder or repository, and tells its name and its files."""

    def put(files):
        if request.param == "folder":
            folder = write(tmp_path / "checkpoint", files)
            return str(folder), lambda: files_of(folder)
        hub.add("me/old", files)
        return "me/old", lambda: dict(hub.files("me/old"))

    return put


@pytest.mark.parametrize("repo", [FULL_ID, HEADS_ID])
def test_all_files_become_those_of_a_fresh_publication(place, published, unchecked, repo):
    source, files = place(aged(published[repo]))
    text_of(source, "--yes")
    assert files() == {**published[repo], **NOT_OURS}
    assert len(unchecked) == 1


@pytest.mark.parametrize("auto_map", [None, {"AutoModel": "given_up_lmtp.Model"}])
def test_of_the_configuration_only_an_auto_map_of_other_classes_changes(
    place, published, unchecked, auto_map
):
    source, files = place(aged(published[FULL_ID], auto_map=auto_map, note="größer"))
    assert "config.json" in text_of(source, "--yes")
    config = json.loads(files()["config.json"])
    assert config == {**json.loads(published[FULL_ID]["config.json"]), "note": "größer"}
    assert config["auto_map"] == AUTO_MAP
    assert files().keys() == published[FULL_ID].keys() | NOT_OURS.keys()


def test_a_configuration_in_a_layout_of_its_own_stays(place, published, unchecked):
    compact = json.dumps(json.loads(published[FULL_ID]["config.json"])).encode()
    source, files = place({**aged(published[FULL_ID]), "config.json": compact})
    assert "config.json" not in text_of(source, "--yes")
    assert files() == {**published[FULL_ID], **NOT_OURS, "config.json": compact}


def test_without_yes_the_changes_are_shown_and_none_is_made(place, published, unchecked, temporary):
    source, files = place(aged(published[FULL_ID]))
    output = text_of(source)
    assert "Nothing was changed. Add --yes" in output
    assert re.findall(r"([\w.]+) │ (added|replaced|removed)", output) == list(CHANGES.items())
    assert files() == aged(published[FULL_ID])
    assert len(unchecked) == 1
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("yes", [[], ["--yes"]], ids=["shown", "with --yes"])
def test_the_same_code_is_nothing_to_do(place, published, unchecked, hub, yes):
    source, files = place({**published[FULL_ID], **NOT_OURS})
    before = hub.snapshot()
    assert f"has the code of modeling-lmtp {__version__} already" in text_of(source, *yes)
    assert files() == {**published[FULL_ID], **NOT_OURS}
    assert hub.snapshot() == before
    assert not unchecked
    assert not any("safetensors" in path for _, path in hub.requests)  # no weights were fetched


def test_files_of_subfolders_are_no_code_of_ours(hub, published, unchecked):
    own = {"more/own_lmtp.py": b"mine", "more/big.safetensors": b"mine"}
    hub.add(FULL_ID, {**aged(published[FULL_ID]), **own})
    text_of(FULL_ID, "--yes")
    assert own.items() <= hub.files(FULL_ID).items()
    assert not any(path.endswith("more/big.safetensors") for _, path in hub.requests)


def test_one_commit_on_the_branch_and_tags_stay(hub, published, unchecked):
    old = hub.add(FULL_ID, aged(published[FULL_ID]))
    repo = hub.repos[FULL_ID]
    repo.tags["v1"], repo.branches["other"] = old, old
    output = text_of(FULL_ID, "--yes", "--revision", "other")
    assert len(repo.commits) == 2
    assert repo.tags == {"v1": old}
    assert repo.branches["main"] == old
    assert f"revision {repo.branches['other']}" in output
    assert "still have other code: v1." in output
    command = f"hf repos tag create {FULL_ID} NAME --revision {repo.branches['other']}"
    assert command in output


def test_the_new_commit_may_be_tagged(hub, published, unchecked):
    old = hub.add(FULL_ID, aged(published[FULL_ID]))
    hub.repos[FULL_ID].tags["v1"] = old
    assert "--tag NAME" in text_of(FULL_ID)
    output = text_of(FULL_ID, "--yes", "--tag", "v2")
    head = hub.repos[FULL_ID].branches["main"]
    assert hub.repos[FULL_ID].tags == {"v1": old, "v2": head}
    assert f"{head}, tagged v2" in output
    assert "name v2 there instead" in output
    assert "still have other code: v1." in text_of(FULL_ID)  # and nothing is to be done


def test_a_tag_with_other_settings_but_the_same_code_is_not_old(hub, published, unchecked):
    config = {**json.loads(published[FULL_ID]["config.json"]), "leap_loss_weight": 0.5}
    files = {**published[FULL_ID], "config.json": json.dumps(config).encode()}
    hub.add(FULL_ID, files)
    hub.repos[FULL_ID].tags["v1"] = hub.repos[FULL_ID].branches["main"]
    hub.add(FULL_ID, aged(published[FULL_ID]))
    assert "still have" not in text_of(FULL_ID, "--yes")


def test_a_private_repository_is_refreshed_with_its_token(hub, published, unchecked, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.add(FULL_ID, aged(published[FULL_ID]))
    hub.repos[FULL_ID].private = True
    assert "that you may read" in error_of("refresh", FULL_ID, "--yes")
    text_of(FULL_ID, "--yes", "--token", TOKEN)
    assert hub.files(FULL_ID) == {**published[FULL_ID], **NOT_OURS}


def test_weights_are_linked_and_not_copied(tmp_path, published, monkeypatch):
    folder = write(tmp_path / "checkpoint", aged(published[FULL_ID]))
    linked = []

    def check(updated, *arguments):
        linked.extend(path.resolve() for path in updated.iterdir() if path.is_symlink())
        assert not (updated / "modeling_lmtp.py").is_symlink()

    monkeypatch.setattr(CHECK.format("refreshing"), check)
    text_of(folder)
    assert folder / "model.safetensors" in linked


def test_a_repository_of_heads_is_tried_as_its_users_load_it(hub, published):
    hub.add(HEADS_ID, aged(published[HEADS_ID]))
    text_of(HEADS_ID, "--yes")
    assert hub.files(HEADS_ID) == {**published[HEADS_ID], **NOT_OURS}


def test_what_the_check_refuses_is_not_written(place, published, monkeypatch, temporary):
    def check(*arguments):
        raise ValueError("It writes another text.")

    monkeypatch.setattr(CHECK.format("refreshing"), check)
    source, files = place(aged(published[FULL_ID]))
    assert "It writes another text." in error_of("refresh", source, "--yes")
    assert files() == aged(published[FULL_ID])
    assert not list(temporary.iterdir())


def test_code_that_does_not_load_is_not_written(tmp_path, published, monkeypatch):
    def write_broken(folder, config):
        write_code(folder, config)
        (folder / "tree_lmtp.py").write_text("raise ImportError('broken')")

    write_code = refreshing.write_code
    monkeypatch.setattr(refreshing, "write_code", write_broken)
    folder = write(tmp_path / "checkpoint", aged(published[FULL_ID]))
    message = error_of("refresh", folder, "--yes")
    assert "does not load as remote code in a fresh process" in message
    assert "ImportError: broken" in message
    assert files_of(folder) == aged(published[FULL_ID])


GENERATE = """
import torch
from transformers import AutoModelForCausalLM
prompt, results = torch.tensor(arguments["prompt"]), {}
for folder, backbone in arguments["folders"]:
    given = {"backbone": backbone} if backbone else {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **given)
    assert type(model).__module__.startswith("transformers_modules")
    options = dict(arguments["options"], attention_mask=torch.ones_like(prompt))
    results[folder] = [
        model.generate(prompt, use_lmtp=use_lmtp, **options).tolist() for use_lmtp in (False, True)
    ]
torch.save(results, output)
"""


def test_checkpoints_of_released_versions_work_again_and_write_the_same_text(
    tmp_path, unchecked, monkeypatch
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders, expected = [], {}
    for version in sorted(path for path in FIXTURES.iterdir() if path.is_dir()):
        for name in HEADS:
            full = tmp_path / version.name / name
            heads, base = (full.with_name(f"{name} {kind}") for kind in ("heads only", "base"))
            for folder in (full, heads):
                shutil.copytree(version / folder.name, folder)
                (folder / "tree_lmtp.py").write_bytes(OLD_CODE)
            LMTPForCausalLM.from_pretrained(full).backbone.save_pretrained(base)
            text_of(full, "--yes")
            text_of(heads, "--yes", "--base-folder", base)
            folders += [(str(full), None), (str(heads), str(base))]
            ids = json.loads((version / f"{name}.json").read_text())["plain_ids"]
            expected |= {str(full): [ids, ids], str(heads): [ids, ids]}
    arguments = {"prompt": PROMPT, "options": OPTIONS, "folders": folders}
    assert run_without_package(GENERATE, arguments, tmp_path) == expected
    assert len(unchecked) == len(folders)


def test_where_the_package_is_imported_its_code_wins_over_the_checkpoints(tmp_path, published):
    folder = write(tmp_path / "checkpoint", aged(published[FULL_ID]))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is LMTPForCausalLM


def test_a_checkpoint_without_tokenizer_is_tried_too(tmp_path):
    folder = tmp_path / "paper"
    shutil.copytree(FIXTURES / "0.1.0" / "paper", folder)
    before = files_of(folder)
    assert "now has the code" in text_of(folder, "--yes")
    assert before.items() <= files_of(folder).items()


# What is refused: what lies in me/old, arguments, and the message
REFUSED = {
    "no such place": (["me/missing"], "There is no folder 'me/missing' on this machine, and no"),
    "no such folder": (["/no/such/folder"], "There is no folder '/no/such/folder'"),
    "a file": (["{file}"], "holds neither a checkpoint with leap heads nor an adapter"),
    "an empty folder": (["{empty}"], "holds neither a checkpoint with leap heads"),
    "a plain model": ([BASE_ID], f"{BASE_ID} holds neither a checkpoint with leap heads"),
    "a repository without a model": (["me/empty"], "me/empty holds neither a checkpoint"),
    "an adapter": ([ADAPTER_ID], f"{ADAPTER_ID} is an adapter and has no code of its own"),
    "an adapter's folder": (["{adapter}"], "its base model brings the code"),
    "no such branch": ([FULL_ID, "--revision", "v1"], "has no branch 'v1'. Its branches are: main"),
    "a tag that exists": ([FULL_ID, "--tag", "v1"], "has a tag 'v1' already"),
    "a folder's branch": (["{empty}", "--revision", "main"], "are for a repository on the Hub"),
    "a folder's tag": (["{empty}", "--tag", "v2"], "are for a repository on the Hub"),
    "a refused token": ([FULL_ID, "--token", "hf_of_nobody"], "401"),
    "a configuration that is no JSON": (["{garbled}"], "config.json is not JSON"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_refreshed_is_refused(
    hub, published, unchecked, tmp_path, temporary, arguments, message
):
    hub.add(ADAPTER_ID, published[ADAPTER_ID])
    hub.add("me/empty", {"README.md": b"nothing"})
    hub.repos.setdefault(FULL_ID, type(hub.repos[BASE_ID])())
    hub.repos[FULL_ID].tags["v1"] = hub.add(FULL_ID, aged(published[FULL_ID]))
    before = hub.snapshot()
    places = {
        "file": write(tmp_path / "files", {"file": b""}) / "file",
        "empty": write(tmp_path / "empty", {}),
        "adapter": write(tmp_path / "adapter", published[ADAPTER_ID]),
        "garbled": write(tmp_path / "garbled", {"config.json": b"{"}),
    }
    found = error_of("refresh", *(text.format(**places) for text in arguments), "--yes")
    assert message in found
    assert hub.snapshot() == before
    assert not unchecked
    assert not list(temporary.iterdir())


def test_heads_on_a_backbone_of_other_sizes_are_refused(hub, published, unchecked, tmp_path):
    fixture = LMTPForCausalLM.from_pretrained(FIXTURES / "0.1.0" / "paper")
    fixture.backbone.save_pretrained(tmp_path / "other")
    hub.add(HEADS_ID, aged(published[HEADS_ID]))
    message = error_of("refresh", HEADS_ID, "--base-folder", tmp_path / "other", "--yes")
    assert "The leap heads do not fit the backbone" in message
    assert hub.files(HEADS_ID) == aged(published[HEADS_ID])


@pytest.mark.parametrize("failing", range(len(CHANGES)))
def test_a_folder_that_cannot_be_written_stays_as_it_was(
    tmp_path, published, unchecked, monkeypatch, failing
):
    folder = write(tmp_path / "checkpoint", aged(published[FULL_ID]))
    name = list(CHANGES)[failing]
    failure = OSError(errno.ENOSPC, "No space left on device")

    def failing_once(method):
        def call(self, *arguments, **options):
            target = Path(arguments[0]) if arguments else self
            if self.parent.name != "old" and target == folder / name:
                raise failure
            return method(self, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing_once(Path.replace))
        # An added file that was not written yet may be taken away without harm
        unlink = failing_once(Path.unlink) if CHANGES[name] == "removed" else Path.unlink
        patch.setattr(Path, "unlink", unlink)
        assert "No space left" in error_of("refresh", folder, "--yes")
    assert files_of(folder) == aged(published[FULL_ID])
    text_of(folder, "--yes")  # and then it works
    assert files_of(folder) == {**published[FULL_ID], **NOT_OURS}


def test_a_full_disk_is_known_before_anything_is_replaced(
    tmp_path, published, unchecked, monkeypatch
):
    folder = write(tmp_path / "checkpoint", aged(published[FULL_ID]))

    def copy(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def check(*arguments):
        monkeypatch.setattr(shutil, "copyfile", copy)

    monkeypatch.setattr(CHECK.format("refreshing"), check)
    assert "No space left" in error_of("refresh", folder, "--yes")
    assert files_of(folder) == aged(published[FULL_ID])


def test_what_a_kill_left_behind_is_cleared_away(tmp_path, published, unchecked):
    folder = write(tmp_path / "checkpoint", aged(published[FULL_ID]))
    (folder / ".refresh.unfinished" / "new").mkdir(parents=True)
    (folder / ".refresh.unfinished" / "new" / "unembeddings_lmtp.py").write_bytes(OLD_CODE)
    text_of(folder, "--yes")
    assert files_of(folder) == {**published[FULL_ID], **NOT_OURS}


FAILURES = {
    "no permission to write": ("POST .*/commit/main", error(403, "you may not"), "you may not"),
    "the hub is down": ("POST .*/commit/main", error(500, "sorry"), "500"),
    "connection dropped": ("POST .*/commit/main", None, "The connection to the Hub failed"),
    "dropped at the start": ("GET .*/refs", None, "The connection to the Hub failed"),
    "weights that do not come": (
        r"(GET|HEAD) .*/model\.safetensors",
        error(403, "no"),
        "in the local cache",
    ),
}


@pytest.mark.parametrize(("request_", "answer", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_what_fails_leaves_the_repository_as_it_was(
    hub, published, unchecked, temporary, request_, answer, message
):
    hub.add(FULL_ID, aged(published[FULL_ID]))
    before = hub.snapshot()
    hub.fail(request_, answer)
    assert message in error_of("refresh", FULL_ID, "--yes", "--tag", "v2")
    assert not hub.failures, "the failure did not happen"
    assert hub.snapshot() == before
    assert not list(temporary.iterdir())
    text_of(FULL_ID, "--yes", "--tag", "v2")  # and then it works


def test_a_commit_of_someone_else_meanwhile_is_not_overwritten(hub, published, monkeypatch):
    hub.add(FULL_ID, aged(published[FULL_ID]))
    theirs = {**aged(published[FULL_ID]), "tree_lmtp.py": b"theirs"}
    monkeypatch.setattr(CHECK.format("refreshing"), lambda *args: hub.add(FULL_ID, theirs))
    assert "A commit has happened since" in error_of("refresh", FULL_ID, "--yes")
    assert hub.files(FULL_ID) == theirs


def test_a_tag_that_fails_is_said(hub, published, unchecked):
    hub.add(FULL_ID, aged(published[FULL_ID]))
    hub.fail("POST .*/tag/", error(500, "sorry"))
    message = error_of("refresh", FULL_ID, "--yes", "--tag", "v2")
    commit = hub.repos[FULL_ID].branches["main"]
    assert f"The commit {commit} is in {FULL_ID}, but tagging it 'v2' failed" in message
    assert f"hf repos tag create {FULL_ID} v2 --revision {commit}" in message


def test_the_check_compares_with_the_model_itself(hub, published, unchecked):
    hub.add(FULL_ID, aged(published[FULL_ID]))
    text_of(FULL_ID)
    _, form, model, prompt_ids, *_ = unchecked[0]
    assert form == "full"
    assert len(prompt_ids) > 5  # of the checkpoint's tokenizer
    assert torch.isfinite(model(torch.tensor([prompt_ids])).logits).all()
