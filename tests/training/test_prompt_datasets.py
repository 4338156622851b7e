"""Prompts from datasets: saved ones, folders and files, and what is refused."""

from __future__ import annotations

import json
import re
import sys

import pytest
from commands import lmtp
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp.training.distill import manifest_path, read_rows
from modeling_lmtp.training.prompt_datasets import DatasetSource, read_dataset_prompts

datasets = pytest.importorskip("datasets")

COLUMNS = {
    "prompt": ["One?", "Two?", "Three?"],
    "messages": [
        [{"role": "system", "content": "Be kind"}, {"role": "user", "content": f"Tell me {n}"}]
        for n in range(3)
    ],
    "conversations": [
        [{"from": "human", "value": f"Say {n}"}, {"from": "gpt", "value": "No"}] for n in range(3)
    ],
    "answers_only": [[{"role": "assistant", "content": "a"}]] * 3,
    "blank": ["a", " ", "b"],
    "number": [1, 2, 3],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    dataset = datasets.Dataset.from_dict(COLUMNS)
    dataset.save_to_disk(folder / "single")
    splits = {"train": dataset, "test": dataset.select([2])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    dataset.select([]).save_to_disk(folder / "no_rows")
    (folder / "files").mkdir()
    rows = [{"prompt": text} for text in COLUMNS["prompt"]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "files" / "a.jsonl").write_text(lines)
    (folder / "files" / "b.csv").write_text('question\n"One, two?"\nThree?\n')
    (folder / "empty.csv").write_text("prompt\n")
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    return folder


def texts(folder, name, limit=None, **options):
    source = DatasetSource(str(folder / name), **options)
    return [prompt.text for prompt in read_dataset_prompts(source, limit)[0]]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("single", {}, ["One?", "Two?", "Three?"]),
        ("single", {"limit": 2}, ["One?", "Two?"]),
        ("single", {"field": "messages"}, ["Tell me 0", "Tell me 1", "Tell me 2"]),
        ("single", {"field": "conversations", "limit": 1}, ["Say 0"]),
        ("splits", {}, ["One?", "Two?", "Three?"]),
        ("splits", {"split": "test"}, ["Three?"]),
        ("files/a.jsonl", {}, ["One?", "Two?", "Three?"]),
        ("files/a.jsonl", {"split": "train[1:]"}, ["Two?", "Three?"]),
        ("files/b.csv", {"field": "question"}, ["One, two?", "Three?"]),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_prompts_are_read_from(folder, name, options, expected):
    assert texts(folder, name, **options) == expected


def test_a_folder_of_data_files_is_a_dataset(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes((folder / "files/a.jsonl").read_bytes())
    assert texts(tmp_path, "data") == ["One?", "Two?", "Three?"]


def test_the_record_distinguishes_datasets_by_their_contents(folder, tmp_path):
    source = DatasetSource(str(folder / "files" / "a.jsonl"))
    _, record = read_dataset_prompts(source)
    assert record["fingerprint"]
    assert record.pop("revision")
    assert record == {
        "name": source.name,
        "config": None,
        "split": "train",
        "field": "prompt",
        "rows": 3,
        "fingerprint": record["fingerprint"],
    }
    assert read_dataset_prompts(source)[1]["fingerprint"] == record["fingerprint"]
    _, other = read_dataset_prompts(DatasetSource(str(folder / "single")))
    assert other["fingerprint"] not in (None, record["fingerprint"])
    assert other["split"] is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "single",
            {"field": "text"},
            "field must be a column of .*, one of answers_only, .*, got 'text'",
        ),
        (
            "single",
            {"field": "blank"},
            "single, row 1: field 'blank' must be a non-empty string .* got ' '",
        ),
        ("single", {"field": "number"}, "single, row 0: field 'number' must be .*, got '1'"),
        (
            "single",
            {"field": "answers_only"},
            "row 0: field 'answers_only' must be .* with a user turn",
        ),
        (
            "single",
            {"split": "train"},
            "single' cannot be read: split must be None for .*, got 'train'",
        ),
        (
            "single",
            {"config": "de"},
            "single' cannot be read: config must be None .*, got 'de'",
        ),
        (
            "splits",
            {"config": "de"},
            "splits' cannot be read: config must be None .*, got 'de'",
        ),
        ("splits", {"split": "dev"}, "split must be one of test, train, got 'dev'"),
        ("files/a.jsonl", {"split": "train[:0]"}, "cannot be read: .* no data"),
        ("no_rows", {}, "no_rows' cannot be read"),
        ("empty.csv", {}, "The dataset .*empty.csv' cannot be read: .* no data"),
        ("files/a.jsonl", {"split": "dev"}, 'The dataset .* cannot be read: Unknown split "dev"'),
        ("files/a.jsonl", {"config": "de"}, "cannot be read: BuilderConfig 'de' not found"),
        ("broken.jsonl", {}, "The dataset .*broken.jsonl' cannot be read: "),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_datasets_without_prompts_are_refused(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        texts(folder, name, **options)


def test_a_missing_dataset_is_an_os_error(folder):
    with pytest.raises(OSError, match=r"Couldn't find any data file at .*nothing/here"):
        texts(folder, "nothing/here")


def test_without_the_package_the_error_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install 'modeling-lmtp\[datasets\]'"):
        texts(folder, "single")


def test_lmtp_distill_answers_the_prompts_of_a_dataset(folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    output = tmp_path / "out.jsonl"
    command = ["distill", tmp_path / "backbone", output, "--dataset", folder / "splits"]
    command += ["--split", "test", "--max_new_tokens", 4]

    def distill(field="messages"):
        return lmtp(*command, "--field", field)

    assert distill().exit_code == 0
    assert [row["prompt"] for row in read_rows(output)] == ["Tell me 2"]
    source = json.loads(manifest_path(output).read_text())["prompt_sources"]["dataset"]
    assert (source["name"], source["split"]) == (str(folder / "splits"), "test")
    assert re.fullmatch("[0-9a-f]{16}", source["fingerprint"])
    assert "0 of them new" in distill().stdout
    other = distill("prompt")
    assert other.exit_code == 1
    assert "prompts_sha256 was " in other.output
    wrong = distill("question")
    assert wrong.output.count("error: field must be a column of the dataset") == 1


@pytest.mark.parametrize("name", ["a.jsonl", "./a.jsonl", "."])
def test_a_dataset_may_lie_in_the_current_folder(folder, tmp_path, monkeypatch, name):
    (tmp_path / "a.jsonl").write_text((folder / "files" / "a.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    prompts, record = read_dataset_prompts(DatasetSource(name))
    assert [prompt.text for prompt in prompts] == COLUMNS["prompt"]
    assert record["name"] == name


def test_rows_without_a_prompt_may_be_skipped(folder):
    skipped = []
    source = DatasetSource(str(folder / "single"), field="blank")
    prompts, record = read_dataset_prompts(source, on_bad_row=skipped.append)
    assert [prompt.text for prompt in prompts] == ["a", "b"]
    assert record["rows"] == 2
    assert len(skipped) == 1
    assert "row 1: field 'blank' must be a non-empty string" in str(skipped[0])
