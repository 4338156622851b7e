"""What cannot be published is refused in one line, before anything is sent or left behind."""

from __future__ import annotations

import errno
import json
import tempfile

import pytest
from commands import error_of, lmtp
from repositories import (
    BASE_ID,
    CARD,
    FULL_ID,
    RECORD,
    files_of,
    hub_in_use,
    save_adapter,
    save_backbone,
    save_full,
)
from tiny import tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.repository import assemble
from modeling_lmtp.conversion.saving import write_record

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A backbone, a full checkpoint on it and an adapter of that."""
    folder = tmp_path_factory.mktemp("saved")
    save_backbone(folder / "base")
    save_full(folder / "full", folder / "base", REVISION)
    save_adapter(folder / "adapter", folder / "full")
    return folder


@pytest.fixture
def source(saved, tmp_path):
    """A copy of the full checkpoint, to be spoilt."""
    source = tmp_path / "source"
    source.mkdir()
    for name, data in files_of(saved / "full").items():
        (source / name).write_bytes(data)
    return source


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """The check in a clean process is under test elsewhere, and takes seconds."""
    checked = []
    name = "modeling_lmtp.conversion.publishing.check_repository"
    monkeypatch.setattr(name, lambda *arguments: checked.append(arguments))
    return checked


def refusal(*arguments):
    return error_of("publish", *arguments, *CARD)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def garble(path):
    path.write_bytes(b"\xff" * 64)


SPOILT = {
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "truncated or corrupt"),
    "corrupt weights": (lambda f: garble(f / "model.safetensors"), "truncated or corrupt"),
    "fewer heads than the configuration says": (
        lambda f: change(f / "config.json", leap_offsets=[2, 3, 5]),
        "leap_heads.2.blocks.0.linear.bias, leap_heads.2.blocks.0.linear.weight",
    ),
    "more heads than it says": (
        lambda f: change(f / "config.json", leap_offsets=[2]),
        "not part of the configured model",
    ),
    "a configuration that is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is not JSON",
    ),
    "no configuration": (
        lambda f: (f / "config.json").unlink(),
        "holds neither a checkpoint with leap heads nor an adapter",
    ),
    "another tokenizer": (
        lambda f: tiny_tokenizer(additional_special_tokens=["<|more|>"]).save_pretrained(f),
        "The tokenizer does not match the model: its token ids go up to",
    ),
    "no record of how it was made": (
        lambda f: (f / "provenance.json").write_text("{}"),
        "does not say which command made the heads",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_checkpoint_is_refused_and_nothing_stays(source, temporary, spoil, message):
    spoil(source)
    before = files_of(source)
    assert message in refusal(source, FULL_ID)
    assert files_of(source) == before
    assert not list(temporary.iterdir())


def test_fewer_layers_than_the_weights_have_are_no_model(source, temporary):
    backbone = json.loads((source / "config.json").read_text())["backbone_config"]
    change(source / "config.json", backbone_config={**backbone, "num_hidden_layers": 1})
    assert "backbone.model.layers.1." in refusal(source, FULL_ID)


ARGUMENTS = {
    "an adapter as a checkpoint": (["adapter", "--form", "full"], "with `lmtp export --to full`"),
    "a checkpoint as an adapter": (["full", "--form", "adapter"], "cannot be published as"),
    "an adapter of a folder": (["adapter"], "with --base_model"),
    "heads of a folder": (["full", "--base-model", "/somewhere/base"], "with --base_model"),
    "heads of a branch": (
        ["full", "--form", "heads", "--base-revision", "main"],
        "pinned to a commit, of 40 hexadecimal digits; got revision 'main'",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_base_model_that_others_cannot_load_is_refused(saved, temporary, arguments, message):
    name, *options = arguments
    assert message in refusal(saved / name, FULL_ID, *options)
    assert not list(temporary.iterdir())


def test_without_yes_nothing_is_sent(saved, tmp_path, unchecked):
    with hub_in_use(tmp_path) as hub:
        result = lmtp("publish", saved / "full", FULL_ID, *CARD)
        assert result.exit_code == 0, result.output
        assert "Nothing was uploaded" in " ".join(result.output.split())
        assert "model.safetensors" in result.output
        assert hub.requests == []
    assert len(unchecked) == 1


def test_a_refused_token_is_known_before_any_work(saved, tmp_path, unchecked):
    with hub_in_use(tmp_path) as hub:
        message = refusal(saved / "full", FULL_ID, "--yes", "--token", "hf_of_nobody")
        assert "401" in message or "Invalid" in message
        assert not hub.repos
    assert not unchecked


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
    ],
    ids=["full disk", "read-only folder"],
)
def test_a_disk_that_takes_no_more_leaves_nothing(saved, tmp_path, temporary, monkeypatch, failure):
    save = LMTPForCausalLM.save_pretrained

    def fail(self, folder, **options):
        save(self, folder, **options)
        raise failure

    monkeypatch.setattr(LMTPForCausalLM, "save_pretrained", fail)
    with hub_in_use(tmp_path) as hub:
        hub.add(BASE_ID, {})
        before = hub.snapshot()
        assert failure.strerror in refusal(saved / "full", FULL_ID, "--yes")
        assert hub.snapshot() == before
    assert not list(temporary.iterdir())


def test_heads_without_a_tokenizer_are_published_with_their_backbones(saved, tmp_path):
    source, output = tmp_path / "heads", tmp_path / "output"
    LMTPForCausalLM.from_pretrained(saved / "full").save_pretrained(source, heads_only=True)
    write_record(source, RECORD, LMTPForCausalLM.from_pretrained(saved / "full").config)
    output.mkdir()
    _, tokenizer = assemble(source, output, "heads", base_folder=saved / "base")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert (output / "tokenizer.json").exists()
