"""Uploading to the Hub: all in one commit, and nothing at all where something fails."""

from __future__ import annotations

import pytest
from hub_server import Answer, error
from repositories import files_of, hub_in_use

from modeling_lmtp.conversion.uploading import upload

# How huggingface_hub uploads
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
REPO = "me/model"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n\n# A model\n"


@pytest.fixture
def hub(tmp_path):
    with hub_in_use(tmp_path) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def own(hub, revision="main"):
    files = dict(hub.files(REPO, revision))
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def test_a_new_repository_holds_the_folder_in_one_tagged_commit(hub, folder):
    commit = upload(folder, REPO, tag="v1", private=True)
    assert own(hub) == files_of(folder)
    assert hub.repos[REPO].private
    assert hub.repos[REPO].tags == {"v1": commit.oid}
    assert hub.repos[REPO].branches == {"main": commit.oid}


def test_a_branch_is_made_and_main_stays(hub, folder):
    before = hub.add(REPO, {"other.txt": b"other"})
    commit = upload(folder, REPO, tag="v1", revision="experiment", replace=True)
    assert hub.repos[REPO].branches == {"main": before, "experiment": commit.oid}
    assert own(hub, "experiment") == files_of(folder)


def test_the_same_content_is_no_other_content(hub, folder):
    first = upload(folder, REPO, tag="v1")
    second = upload(folder, REPO, tag="v2")
    assert second.oid == first.oid
    assert hub.repos[REPO].tags == {"v1": first.oid, "v2": first.oid}


@pytest.mark.parametrize("there", ["config.json", "model.safetensors", "other.txt"])
def test_other_content_is_refused(hub, folder, there):
    hub.add(REPO, {there: bytes(reversed(range(256)))})
    before = hub.snapshot()
    with pytest.raises(ValueError, match=rf"holds other content: {there}.*--replace"):
        upload(folder, REPO, tag="v1")
    assert hub.snapshot() == before


def test_other_content_is_replaced_if_told_so(hub, folder):
    hub.add(REPO, {".gitattributes": b"kept", "config.json": b"old", "other.txt": b"other"})
    upload(folder, REPO, tag="v1", replace=True)
    assert own(hub) == files_of(folder)
    assert hub.files(REPO)[".gitattributes"] == b"kept"


def test_a_tag_that_exists_is_not_moved(hub, folder):
    upload(folder, REPO, tag="v1")
    before = hub.snapshot()
    with pytest.raises(ValueError, match="has a tag 'v1' already"):
        upload(folder, REPO, tag="v1", replace=True)
    assert hub.snapshot() == before


FAILURES = {
    "token refused when the repository is made": ("POST /api/repos/create", error(401, "no")),
    "card refused": ("POST /api/validate-yaml", Answer(400, {"errors": [{"message": "bad"}]})),
    "upload refused": ("PUT /lfs/", error(403, "no")),
    "upload arrives broken": (r"POST /lfs/\w+/verify", error(422, "not all arrived")),
    "batch refused": ("POST /me/model.git/info/lfs", error(413, "too large")),
    "commit rejected": ("POST .*/commit/main", error(403, "you may not")),
    "someone committed since": ("POST .*/commit/main", error(412, "a commit has happened since")),
    "the hub is down": ("POST .*/commit/main", error(500, "sorry")),
    "connection dropped at the start": ("GET /api/models/me/model", None),
    "connection dropped at the commit": ("POST .*/commit/main", None),
}


@pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize(("request_", "answer"), FAILURES.values(), ids=FAILURES.keys())
def test_what_fails_leaves_hub_and_folder_as_they_were(hub, folder, request_, answer, exists):
    if exists and "create" in request_:
        pytest.skip("it is not made")
    if exists:
        hub.add(REPO, {"other.txt": b"other"})
    before, local = hub.snapshot(), files_of(folder)
    hub.fail(request_, answer)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        upload(folder, REPO, tag="v1", replace=exists)
    assert not hub.failures, "the failure did not happen"
    assert hub.snapshot() == before
    assert files_of(folder) == local
    upload(folder, REPO, tag="v1", replace=exists)  # and then it works
    assert own(hub) == files_of(folder)


def test_a_connection_dropped_during_the_upload_is_taken_up_again(hub, folder):
    hub.fail("PUT /lfs/", None)
    upload(folder, REPO, tag="v1")
    assert not hub.failures
    assert own(hub) == files_of(folder)


@pytest.mark.parametrize("branch", [None, "experiment"])
def test_a_tag_that_fails_takes_back_what_was_new(hub, folder, branch):
    if branch:
        hub.add(REPO, {"other.txt": b"other"})
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    hub.fail("POST .*/tag/", error(500, "sorry"))
    with pytest.raises(OSError, match="500"):
        upload(folder, REPO, tag="v1", revision=branch, replace=True)
    assert {name: repo.branches for name, repo in hub.repos.items()} == before


def test_a_tag_that_fails_where_a_commit_cannot_be_taken_back_is_said(hub, folder):
    hub.add(REPO, {})
    hub.fail("POST .*/tag/", error(500, "sorry"))
    with pytest.raises(
        RuntimeError, match=r"The commit \w{40} is in me/model, but tagging it 'v1' failed"
    ):
        upload(folder, REPO, tag="v1")


def test_a_refused_token_is_huggingface_hub_s_error(hub, folder, monkeypatch):
    with pytest.raises(OSError, match="401"):
        upload(folder, REPO, tag="v1", token="hf_of_nobody")
    assert not hub.repos
