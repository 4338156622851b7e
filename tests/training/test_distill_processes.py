"""Self-distillation by several processes: the file is that of one process, whoever is killed."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from accelerate import PartialState, debug_launcher
from tiny import tiny_llama, tiny_tokenizer
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from modeling_lmtp.conversion.prompts import Prompt
from modeling_lmtp.training import distill as distill_module
from modeling_lmtp.training.distill import (
    DistillSettings,
    append_rows,
    distill,
    manifest_path,
    model_fingerprint,
    read_rows,
)
from modeling_lmtp.training.distill_files import AnswerFiles, find_parts, part_path, writer_lock
from modeling_lmtp.training.processes import MainProcessError, on_main, process_state
from modeling_lmtp.training.self_written import SampleLog, self_written_prompts
from modeling_lmtp.training.writers import ModelWriter

# Python 3.12 and later warn of every fork beside other threads; torch keeps some. Accelerate warns
# where it chooses the number of threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:OMP_NUM_THREADS:UserWarning"),
]

PROMPTS = [
    Prompt(text) for text in ("Hi", "the sea", "a", "A spider asks", "é?", "Paris", "of", "to")
]
SETTINGS = DistillSettings(
    max_new_tokens=5, batch_size=2, temperature=1.0, num_answers=2, magpie_max_tokens=48
)
NUM_BATCHES = 8
# Samples of a random model are rarely usable: batches 0 and 2 hold none, 1 and 3 one prompt each.
WRITING, COUNT, NUM_SAMPLED = replace(SETTINGS, batch_size=4), 2, 4


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def whole(model, tokenizer, tmp_path_factory):
    """What one process makes that nobody disturbs: the answers and the manifest."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    distill(model, tokenizer, PROMPTS, output, SETTINGS, progress=False)
    return output.read_bytes(), manifest_path(output).read_bytes()


def launch(num_processes, work, *args):
    """Run `work(*args)` in so many processes of one job; an error in any of them is raised here."""

    def start():
        PartialState._reset_state()  # inherited from the test's own process
        work(*args)

    debug_launcher(start, num_processes=num_processes)


def run(model, tokenizer, output, settings=SETTINGS, killed_process=None, after=0):
    """Distill; a killed process ends without a word once it has answered `after` batches."""
    answers = []

    def generate_ids(*args, **kwargs):
        if process_state().process_index == killed_process and len(answers) == after:
            os._exit(9)
        answers.append(None)
        return generate(*args, **kwargs)

    generate = distill_module.generate_ids
    distill_module.generate_ids = generate_ids
    try:
        return distill(model, tokenizer, PROMPTS, output, settings, progress=False)
    finally:
        distill_module.generate_ids = generate
        (output.parent / f"answered-{process_state().process_index}").write_text(str(len(answers)))


def made(output):
    assert find_parts(output) == []
    return output.read_bytes(), manifest_path(output).read_bytes()


def made_so_far(folder):
    return {path: path.read_bytes() for path in folder.glob("*out.jsonl*")}


@pytest.mark.parametrize("num_processes", [2, 3])
def test_each_process_answers_its_share_of_the_same_file(
    model, tokenizer, tmp_path, whole, num_processes
):
    output = tmp_path / "out.jsonl"
    launch(num_processes, run, model, tokenizer, output)
    assert made(output) == whole
    shares = [int(path.read_text()) for path in sorted(tmp_path.glob("answered-*"))]
    assert sum(shares) == NUM_BATCHES
    assert shares == {2: [4, 4], 3: [3, 3, 2]}[num_processes]


@pytest.mark.parametrize("killed_process", [0, 1])
@pytest.mark.parametrize("processes_then", [1, 3])
def test_any_number_of_processes_finishes_a_job_with_a_killed_process(
    model, tokenizer, tmp_path, whole, killed_process, processes_then
):
    output = tmp_path / "out.jsonl"
    # The other one is ended, or finds that it lost its peer
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        launch(2, run, model, tokenizer, output, SETTINGS, killed_process, 2)
    assert not (tmp_path / f"answered-{killed_process}").exists()
    (tmp_path / f"answered-{1 - killed_process}").unlink(missing_ok=True)
    kept = sum(
        len(path.read_text().splitlines())
        for path in (output, *find_parts(output))
        if path.exists()
    )
    assert 2 * SETTINGS.batch_size <= kept < NUM_BATCHES * SETTINGS.batch_size
    launch(processes_then, run, model, tokenizer, output)
    assert made(output) == whole
    shares = [int(path.read_text()) for path in tmp_path.glob("answered-*")]
    assert kept + sum(shares) * SETTINGS.batch_size == NUM_BATCHES * SETTINGS.batch_size


def deal(whole, output, num_parts, cut):
    """Lay out the files as `num_parts` processes have them, each stopped `cut` bytes before its end."""
    answers, manifest = whole
    lines = answers.splitlines(keepends=True)
    size = SETTINGS.batch_size
    batches = [lines[start : start + size] for start in range(0, len(lines), size)]
    for process in range(num_parts):
        path = part_path(output, process) if process else output
        data = b"".join(line for batch in batches[process::num_parts] for line in batch)
        path.write_bytes(data[: len(data) - cut])
    manifest_path(output).write_bytes(manifest)


@pytest.mark.parametrize("num_parts", [2, 3, 12])
@pytest.mark.parametrize("cut", [0, 1, 70, 400])
def test_parts_that_were_cut_anywhere_are_folded_and_finished(
    model, tokenizer, tmp_path, whole, num_parts, cut
):
    output = tmp_path / "out.jsonl"
    deal(whole, output, num_parts, cut)
    run(model, tokenizer, output)
    assert made(output) == whole


def test_a_kill_between_folding_and_removing_parts_duplicates_no_row(
    model, tokenizer, tmp_path, whole
):
    output = tmp_path / "out.jsonl"
    deal(whole, output, 3, 0)
    output.write_bytes(whole[0])
    assert run(model, tokenizer, output).new_rows == 0
    assert made(output) == whole


def test_parts_count_without_a_file_of_the_main_process(model, tokenizer, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    deal(whole, output, 2, 0)
    output.unlink()
    assert run(model, tokenizer, output).new_rows == len(whole[0].splitlines()) // 2
    assert made(output) == whole


def test_parts_of_another_run_are_refused_and_unchanged(model, tokenizer, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    deal(whole, output, 2, 9)
    output.unlink()
    before = made_so_far(tmp_path)
    with pytest.raises(ValueError, match=r"settings.seed was 0 and is 3 now"):
        run(model, tokenizer, output, replace(SETTINGS, seed=3))
    assert made_so_far(tmp_path) == before
    manifest_path(output).unlink()
    with pytest.raises(ValueError, match=r"out.jsonl.part1.jsonl exists without out.jsonl.manif"):
        run(model, tokenizer, output)


def test_a_row_that_answers_no_prompt_is_refused(model, tokenizer, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    deal(whole, output, 1, 0)
    append_rows(output, [{**read_rows(output)[0], "id": "mine"}])
    with pytest.raises(ValueError, match="a row 'mine' that answers none of the prompts"):
        run(model, tokenizer, output)


def test_files_that_look_like_parts_are_left_alone(model, tokenizer, tmp_path, whole):
    others = [tmp_path / name for name in ("out.jsonl.partial.jsonl", "b.jsonl.part1.jsonl")]
    for path in others:
        path.write_text("mine")
    run(model, tokenizer, tmp_path / "out.jsonl")
    assert made(tmp_path / "out.jsonl") == whole
    assert [path.read_text() for path in others] == ["mine", "mine"]


def test_a_refusal_on_the_main_process_ends_all_processes(model, tokenizer, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    deal(whole, output, 1, 0)

    def refused():
        try:
            run(model, tokenizer, output, replace(SETTINGS, seed=3))
        except (ValueError, MainProcessError) as error:
            message = f"{type(error).__name__}: {error}"
            (tmp_path / f"error-{process_state().process_index}").write_text(message)

    launch(2, refused)
    first, second = ((tmp_path / f"error-{process}").read_text() for process in range(2))
    assert first.startswith("ValueError: ")
    assert "settings.seed was 0 and is 3 now" in first
    assert second == f"MainProcessError: the main process failed: {first}"
    assert made(output) == whole


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_outlived_its_launcher_locks_its_file(
    model, tokenizer, tmp_path, whole, process
):
    output = tmp_path / "out.jsonl"
    deal(whole, output, 2, 9)
    path = part_path(output, process) if process else output
    with writer_lock(path):
        before = made_so_far(tmp_path)
        with pytest.raises(ValueError, match=f"Another process is writing to .*{path.name}"):
            run(model, tokenizer, output)
        assert made_so_far(tmp_path) == before
    run(model, tokenizer, output)
    assert made(output) == whole
    assert not list(tmp_path.glob(".*"))


def test_every_process_locks_its_part(model, tokenizer, tmp_path):
    output = tmp_path / "out.jsonl"
    with (
        writer_lock(part_path(output, 1)),
        pytest.raises(
            ProcessRaisedException, match=r"Another process is writing to .*out.jsonl.part1.jsonl"
        ),
    ):
        launch(2, run, model, tokenizer, output)


def test_missing_answers_of_other_processes_are_an_error(tmp_path):
    files = AnswerFiles(tmp_path / "out.jsonl", {"versions": []}, ["a", "b"], 0)
    files.open()
    with pytest.raises(RuntimeError, match=r"out.jsonl lacks 2 answers. Write to a folder"):
        files.close()


def test_on_main_returns_its_result_on_every_process(tmp_path):
    def ask():
        index = process_state().process_index
        (tmp_path / f"{index}").write_text(on_main(lambda: f"asked process {index}"))

    launch(3, ask)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"asked process 0"}


def test_unconnected_processes_are_refused(monkeypatch):
    PartialState()  # of one process
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match="4 processes were launched, but they are not connected"):
        process_state()


def sample_log(model, path, settings=WRITING):
    return SampleLog(path, {"model_fingerprint": model_fingerprint(model)}, settings)


def write(model, tokenizer, path, count=COUNT):
    log = sample_log(model, path)
    return self_written_prompts(ModelWriter(model, tokenizer), count, WRITING, log=log)


def test_self_written_prompts_do_not_depend_on_the_number_of_processes(model, tokenizer, tmp_path):
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    prompts = write(model, tokenizer, alone)

    def write_together():
        texts = json.dumps([prompt.text for prompt in write(model, tokenizer, together)])
        (tmp_path / f"prompts-{process_state().process_index}").write_text(texts)

    launch(3, write_together)
    for process in range(3):
        texts = json.loads((tmp_path / f"prompts-{process}").read_text())
        assert texts == [prompt.text for prompt in prompts]
    logged = together.read_bytes().splitlines()
    assert len(logged) == 1 + 5, "two rounds of three, up to ten samples for each prompt"
    assert logged[: 1 + NUM_SAMPLED] == alone.read_bytes().splitlines()
    together.write_bytes(b"\n".join(logged[:3]) + b"\n")
    assert write(model, tokenizer, together) == prompts
    assert together.read_bytes() == alone.read_bytes()


def test_stopped_sampling_resumes_after_the_logged_batches(model, tokenizer, tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    prompts = write(model, tokenizer, path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 1 + NUM_SAMPLED
    for offset in (5, ends[2], ends[-1] - 1, ends[-1]):
        path.write_bytes(whole[:offset])
        assert write(model, tokenizer, path) == prompts
        assert path.read_bytes() == whole, f"killed after {offset} bytes"


def test_finished_sampling_does_not_run_the_model_again(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    prompts = write(model, tokenizer, path)
    monkeypatch.setattr("modeling_lmtp.training.writers.generate_ids", None)
    assert write(model, tokenizer, path) == prompts
    assert write(model, tokenizer, path, count=1) == prompts[:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(WRITING, seed=3)}, "settings.seed was 0 and is 3 now"),
        ({"model": tiny_llama(seed=1)}, "model_fingerprint was "),
    ],
    ids=["settings", "model"],
)
def test_a_log_of_another_run_is_refused_and_unchanged(model, tmp_path, change, message):
    path = tmp_path / "log.jsonl"
    log = sample_log(model, path)
    assert log.read() == []
    log.append([["One"], ["Two", ""]])
    assert log.read() == [["One"], ["Two", ""]]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        sample_log(**{"model": model, "path": path, **change}).read()
    assert path.read_bytes() == before
