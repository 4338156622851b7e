"""`lmtp distill` as a user types it: where prompts come from, stops, several processes, refusals."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import lmtp
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp.training.distill_files import manifest_path, part_path, writer_lock

TEXTS = ["What is the sea?", "Write a poem.", "A spider asks", "Paris", "The wind", "France?"]
SETTINGS = ["--max_new_tokens", 8, "--batch_size", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    tiny_llama().save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS)
    (folder / "prompts.jsonl").write_text(rows)
    return folder


def distill(folder, output, *arguments, model=None):
    model = model or folder / "backbone"
    command = ["distill", model, output, *SETTINGS, *arguments]
    return lmtp(*command)


def error_of(folder, output, *arguments, **options):
    result = distill(folder, output, *arguments, **options)
    assert result.exit_code == 1, result.output
    assert result.output.count("error:") == 1
    return re.sub(r"\s+", " ", result.output)


def test_the_bar_shows_speed_and_remaining_time_and_a_line_reports_the_result(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    result = distill(folder, output, "--prompts", folder / "prompts.jsonl")
    assert re.search(r"6/6 \[00:\d\d<00:\d\d, .*answer.*, \d+ tokens/s\]", result.stderr)
    tokens = json.loads(manifest_path(output).read_text())["tokens"]
    assert re.search(
        rf"6 answers, {tokens} tokens, \d+% finished, in {re.escape(str(output))} "
        r"\(6 of them new, \d+ tokens/s, in 0:\d\d:\d\d\)\.",
        result.stdout,
    )
    again = distill(folder, output, "--prompts", folder / "prompts.jsonl")
    assert re.search(r"\(0 of them new, in 0:00:0\d\)", again.stdout)


def test_the_manifest_records_the_source_of_the_prompts(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    distill(
        folder, output, "--prompts", folder / "prompts.jsonl", "--limit", 4, "--self_written", 1
    )
    sources = json.loads(manifest_path(output).read_text())["prompt_sources"]
    assert sources["self_written"] == 1
    assert sources["file"].pop("sha256")
    path = str(folder / "prompts.jsonl")
    assert sources["file"] == {"path": path, "field": "prompt", "rows": 4}


def test_self_written_prompts_survive_a_stop_at_any_time(folder, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    distill(folder, tmp_path / "out.jsonl", "--self_written", 3)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(whole) == {"out.jsonl", "out.jsonl.manifest.json", "out.jsonl.prompts.jsonl"}
    for path in tmp_path.iterdir():
        path.unlink()

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    for stage in ("training.distill_command.replace_rows", "training.distill_command.distill"):
        with monkeypatch.context() as patch:
            patch.setattr(f"modeling_lmtp.{stage}", stopped)
            distill(folder, output, "--self_written", 3)
        assert "out.jsonl.samples.jsonl" in {path.name for path in tmp_path.iterdir()}
        # What was sampled is not sampled again
        with monkeypatch.context() as patch:
            patch.setattr("modeling_lmtp.training.writers.generate_ids", None)
            patch.setattr(f"modeling_lmtp.{stage}", stopped)
            distill(folder, output, "--self_written", 3)
    assert distill(folder, output, "--self_written", 3).exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.writers.generate_ids", None)
        assert "0 of them new" in distill(folder, output, "--self_written", 3).stdout


def test_only_one_run_at_a_time_samples_prompts(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    with writer_lock(tmp_path / "out.jsonl.samples.jsonl"):
        message = error_of(folder, output, "--self_written", 3)
    assert "out.jsonl.samples.jsonl. Wait for it" in message


def test_other_self_written_prompts_need_another_output(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    distill(folder, output, "--self_written", 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    more = error_of(folder, output, "--self_written", 3)
    assert "out.jsonl was made with --self_written 2." in more
    seed = error_of(folder, output, "--self_written", 2, "--seed", 1)
    assert "settings.seed was 0 and is 1 now" in seed
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_without_self_written_prompts_is_refused_before_any_are_sampled(
    folder, tmp_path, monkeypatch
):
    output = tmp_path / "out.jsonl"
    distill(folder, output, "--prompts", folder / "prompts.jsonl")
    monkeypatch.setattr("modeling_lmtp.training.writers.generate_ids", None)
    message = error_of(folder, output, "--self_written", 2)
    assert "was made without out.jsonl.prompts.jsonl" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "There are no prompts to answer: pass --prompts FILE, --dataset NAME or --self_written",
        ),
        (["--prompts", "p.jsonl", "--dataset", "d"], "Pass --prompts FILE or --dataset NAME, not"),
        (["--prompts", "p.jsonl", "--split", "test"], "--split test needs --dataset NAME"),
        (["--self_written", 2, "--dataset_config", "de"], "--dataset_config de needs --data"),
        (["--self_written", 2, "--limit", 9], "--limit 9 needs --prompts FILE or --dataset"),
        (["--limit", 9], "There are no prompts to answer"),
        (["--prompts", "p.jsonl", "--server_model", "m"], "--server_model m needs --server"),
        (["--prompts", "p.jsonl", "--server", "localhost:8000"], "server must be a URL"),
        (["--prompts", "p.jsonl", "--kinds", "all"], "--kinds all needs --self_written N"),
        (["--self_written", 2, "--kinds", "prose"], "kinds must be all, or some of chat, writing"),
        (
            ["--server", "http://x/v1", "--prompts", "p.jsonl", "--dtype", "float16"],
            "--dtype float16 has no effect with --server",
        ),
        (["--prompts", "missing.jsonl"], "No such file or directory: 'missing.jsonl'"),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[-2:])) if type(value) is list else "",
)
def test_contradicting_options_are_refused(folder, tmp_path, arguments, message):
    assert message in error_of(folder, tmp_path / "out.jsonl", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_output_name_is_refused_before_anything_is_loaded(folder, tmp_path):
    message = error_of(folder, tmp_path / "out.json", "--prompts", "missing", model="missing")
    assert "output must be a file name that ends in .jsonl, got 'out.json'" in message


def test_two_processes_finish_the_run_of_three_others(folder, tmp_path):
    arguments = ["--prompts", folder / "prompts.jsonl", "--self_written", 2]
    one, two = tmp_path / "one" / "out.jsonl", tmp_path / "two" / "out.jsonl"
    distill(folder, one, *arguments)
    two.parent.mkdir()
    lines = one.read_bytes().splitlines(keepends=True)
    two.write_bytes(b"".join(lines[:2]))
    part_path(two, 2).write_bytes(b"".join(lines[4:6])[:-9])
    manifest_path(two).write_bytes(manifest_path(one).read_bytes())
    prompts = "out.jsonl.prompts.jsonl"
    (two.parent / prompts).write_bytes((one.parent / prompts).read_bytes())

    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    # Any free port, since other runs may hold the usual one
    launcher += ["--num_processes", "2", "--main_process_port", "0", "--no_python"]
    launcher += [Path(sys.executable).parent / "lmtp"]
    command = [*launcher, "distill", folder / "backbone", two, *SETTINGS, *arguments]
    result = subprocess.run(
        [str(argument) for argument in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("8 answers") == 1
    assert "(5 of them new" in result.stdout
    assert "process 1 of 2" in result.stderr
    assert {path.name: path.read_bytes() for path in two.parent.iterdir()} == {
        path.name: path.read_bytes() for path in one.parent.iterdir()
    }


def test_bad_rows_are_refused_or_skipped_with_an_option(folder, tmp_path, caplog):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    good = json.dumps({"prompt": TEXTS[0]})
    prompts.write_text(f'{good}\n{{"prompt": ""}}\n{{"prompt": \n')
    refused = error_of(folder, output, "--prompts", prompts)
    assert "prompts.jsonl:2: expected a non-empty string" in refused
    assert "--bad_rows skip" in refused
    assert "invalid choice: 'drop'" in error_of(
        folder, output, "--prompts", prompts, "--bad_rows", "drop"
    )
    assert not output.exists()
    logger = logging.getLogger("modeling_lmtp")
    logger.addHandler(caplog.handler)
    try:
        result = distill(folder, output, "--prompts", prompts, "--bad_rows", "skip")
    finally:
        logger.removeHandler(caplog.handler)
    assert result.exit_code == 0
    assert len(output.read_text().splitlines()) == 1
    assert "Skipped 2 bad rows: " in caplog.text
    assert "prompts.jsonl:3: not JSON" in caplog.text


def test_the_error_names_a_damaged_manifest(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    assert distill(folder, output, "--prompts", folder / "prompts.jsonl").exit_code == 0
    manifest_path(output).write_text("{")
    error = error_of(folder, output, "--prompts", folder / "prompts.jsonl")
    assert "out.jsonl.manifest.json is not JSON" in error
