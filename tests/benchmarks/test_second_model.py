"""Another architecture all the way: a small Gemma 3, trained from scratch, gets heads and drafts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import lmtp
from scripts import load_script
from transformers import AutoConfig

from modeling_lmtp.conversion.prompts import read_prompts
from modeling_lmtp.conversion.saving import read_json

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

CODE = """\
def add(first, second):
    '''Return the sum of two numbers, which may be of any kind.'''
    return first + second


"""
PAGE = """\
Numbers are added with `add`, which takes two of them, of any kind, and returns their sum at once.

"""


@pytest.fixture(scope="module")
def second_model():
    return load_script("second_model")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for number in range(6):
        (folder / f"part_{number}.py").write_text(CODE * 20)
        (folder / f"page_{number}.md").write_text(PAGE * 20)
    (folder / "untracked.py").write_text("secret = 1\n")
    names = [
        f"{kind}_{i}.{suffix}"
        for kind, suffix in (("part", "py"), ("page", "md"))
        for i in range(6)
    ]
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", *names], cwd=folder, check=True)
    return folder


def test_files_are_those_that_git_tracks_and_some_are_held_out(second_model, repository):
    files = second_model.read_files(repository)
    assert len(files) == 12
    learned, held_out = second_model.split_files(files)
    assert not learned.keys() & held_out.keys()
    assert {**learned, **held_out} == files
    assert len(held_out) == 1


def test_it_is_trained_gets_heads_and_writes_the_same_text_with_them(
    second_model, repository, tmp_path, monkeypatch
):
    sizes = ["--steps", "2", "--hidden-size", "32"]
    arguments = ["second_model.py", str(tmp_path), "--corpus", str(repository), *sizes]
    monkeypatch.setattr(sys, "argv", arguments)
    second_model.main()
    config = AutoConfig.from_pretrained(tmp_path / "backbone")
    assert config.model_type == "gemma3_text"
    assert {prompt.kind for prompt in read_prompts(tmp_path / "prompts.jsonl")} == {"code", "pages"}
    answers, heads = tmp_path / "answers.jsonl", tmp_path / "heads"
    few = ["--limit", 4, "--max_new_tokens", 8]
    offsets = ["--leap_offsets", 2, 3, "--head_context", "path"]
    held_out = ["--prompts", tmp_path / "held_out.jsonl"]
    for command in (
        ["distill", tmp_path / "backbone", answers, "--prompts", tmp_path / "prompts.jsonl", *few],
        [
            "train",
            tmp_path / "backbone",
            answers,
            heads,
            *offsets,
            "--held_out",
            1,
            "--max_steps",
            2,
        ],
        ["verify", heads, *held_out, "--num_prompts", 2, "--max_new_tokens", 8],
    ):
        result = lmtp(*command)
        assert result.exit_code == 0, result.output
    assert read_json(heads / "config.json")["leap_offsets"] == [2, 3]
