"""The commands, as a user types them, on a tiny model in a folder."""

import json
import re
from dataclasses import replace

import pytest
from bench_runs import write_checkpoint
from commands import error_of, lmtp
from rich.console import Console
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks import comparison
from modeling_lmtp.benchmarks.streaming import split_text

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
TRAINING = [
    "--leap_offsets", 2, 3, 5, "--held_out", 2, "--per_device_train_batch_size", 2,
    "--num_train_epochs", 1,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama().save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    prompts = ["What is the sea?", "Write a poem.", "A spider asks", "Paris", "The wind", "France?"]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    )
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    output = folder / "answers.jsonl"
    arguments = ["--prompts", folder / "prompts.jsonl", "--max_new_tokens", 12]
    assert lmtp("distill", folder / "backbone", output, *arguments).exit_code == 0
    return output


@pytest.fixture(scope="module")
def checkpoint(folder):
    return write_checkpoint(folder / "checkpoint", leap_offsets=(2, 3, 5), head_context=0)


@pytest.fixture(scope="module")
def trained(folder, answers):
    output = folder / "trained"
    result = lmtp("train", folder / "backbone", answers, output, *TRAINING)
    assert result.exit_code == 0
    assert "simulated tokens per step" in " ".join(result.output.split())
    return output


def test_distill_again_answers_nothing_twice(folder, answers):
    before = answers.read_bytes()
    arguments = ["--prompts", folder / "prompts.jsonl", "--max_new_tokens", 12]
    result = lmtp("distill", folder / "backbone", answers, *arguments)
    assert "0 of them new" in re.sub(r"\s+", " ", result.output)
    assert answers.read_bytes() == before


def test_train_saves_a_checkpoint_with_its_record_and_nothing_else_beside_it(folder, trained):
    model = LMTPForCausalLM.from_pretrained(trained)
    assert model.config.leap_offsets == (2, 3, 5)
    record = json.loads((trained / "provenance.json").read_text())
    assert record["command"] == "lmtp train"
    assert record["examples"] == 4
    assert len(record["held_out"]["accuracies"]) == 4
    assert not (folder / "trained.training").exists()


def test_generate_streams_the_plain_text(checkpoint):
    plain = lmtp("generate", checkpoint, "The sea", "--max_new_tokens", 20, "--plain")
    fast = lmtp("generate", checkpoint, "The sea", "--max_new_tokens", 20)
    assert fast.stdout == plain.stdout
    assert "tokens per step" in fast.stderr


def test_shown_drafts_are_the_plain_text_and_add_up(checkpoint):
    plain = lmtp("generate", checkpoint, "The sea", "--max_new_tokens", 20, "--plain")
    shown = lmtp("generate", checkpoint, "The sea", "--max_new_tokens", 20, "--show-drafts")
    assert shown.stdout == plain.stdout
    legend = re.search(r"tokens by source: (\d+) plain, (\d+) head, (\d+) lookup\n", shown.stderr)
    [steps] = re.findall(
        r"20 tokens in (\d+) steps? after the prefill: [\d.]+ tokens per step, [\d.]+ candidates "
        r"per step, [\d.]+ tokens/s",
        shown.stderr,
    )
    assert sum(map(int, legend.groups())) == 20
    assert int(legend[1]) == 1 + int(steps) < 20
    assert "1.00 tokens per step, 0.00 candidates per step" in plain.stderr


def test_shown_drafts_have_a_style_for_each_source_where_the_terminal_has_any(
    checkpoint, monkeypatch
):
    terminal = Console(soft_wrap=True, force_terminal=True, color_system="standard")
    monkeypatch.setattr("modeling_lmtp.benchmarks.streaming.console", terminal)
    arguments = ["generate", checkpoint, "The sea", "--max_new_tokens", 20]
    plain, shown = lmtp(*arguments, "--plain"), lmtp(*arguments, "--show_drafts")
    assert re.sub(r"\x1b\[[\d;]*m", "", shown.stdout) == plain.stdout
    counts = re.search(r"(\d+) plain, (\d+) head, (\d+) lookup", shown.stderr)
    for source, style in ((2, "1;32"), (3, "4;36")):
        assert shown.stdout.count(f"\x1b[{style}m") <= int(
            counts[source]
        )  # some may end no character
    assert "\x1b[" in shown.stdout


TEXTS = ["The sea\t🦊 asks", "猫🦊", "x\r\n\x07y", "a<|im_end|>", "🦊"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_tokens_get_the_characters_that_they_complete(text):
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    pieces = split_text(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(pieces) == len(tokens)
    for count in range(1, len(tokens)):
        known = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        assert "".join(pieces[:count]) == known.rstrip("\ufffd")


def test_an_answer_may_end_inside_a_character():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("猫🦊", add_special_tokens=False).input_ids[:-1]
    assert "".join(split_text(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_an_answer_of_one_token_has_no_steps_to_count(checkpoint):
    result = lmtp("generate", checkpoint, "The sea", "--max_new_tokens", 1)
    assert result.exit_code == 0, result.output
    assert "1 token\n" in result.stderr
    assert "per step" not in result.stderr


def test_verify_finds_equal_texts_and_writes_the_figures(folder, checkpoint, tmp_path):
    figures = tmp_path / "figures.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 3, "--max_new_tokens", 16]
    result = lmtp("verify", checkpoint, *arguments, "--output", figures)
    assert result.exit_code == 0, result.output
    results = json.loads(figures.read_text())["results"]
    modes, drafts = ("greedy", "sampling"), ("chain", "tree", "planned")
    assert set(results) == {f"{mode}, {draft}" for mode in modes for draft in drafts}
    assert all(result["equal"] == result["prompts"] == 3 for result in results.values())
    assert "Tier: tree (trees are exact; float32, cpu, sdpa" in result.output


def test_verify_decodes_batches_as_well(folder, checkpoint, tmp_path):
    figures = tmp_path / "figures.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 3, "--max_new_tokens", 8]
    result = lmtp("verify", checkpoint, *arguments, "--batch_size", 2, "--output", figures)
    assert result.exit_code == 0, result.output
    record = json.loads(figures.read_text())
    assert record["batch_size"] == 2
    for draft in ("chain", "tree", "planned"):
        found = record["results"][f"greedy, batches of 2, {draft}"]
        assert found["equal"] == found["prompts"] == 4  # the last batch repeats the first prompt
        assert found["new_tokens"] == 4 * 8


def test_verify_fails_where_a_batch_differs(folder, checkpoint, monkeypatch):
    def swapped(method, batch, seed, options):
        found = run(method, batch, seed, options)
        return found if not method.is_ours else replace(found, texts=found.texts[::-1])

    run = comparison.run
    monkeypatch.setattr(comparison, "run", swapped)
    arguments = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 2, "--max_new_tokens", 8]
    assert lmtp("verify", checkpoint, *arguments).exit_code == 0
    assert lmtp("verify", checkpoint, *arguments, "--batch_size", 2).exit_code == 1


def test_verify_tries_what_the_checkpoint_drafts(folder, checkpoint, tmp_path):
    model = LMTPForCausalLM.from_pretrained(checkpoint)
    model.generation_config.draft_nodes = 5
    model.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    arguments = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 1, "--max_new_tokens", 8]
    result = lmtp("verify", tmp_path / "tuned", *arguments, "--output", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["drafts"]["as saved"] == {"draft_nodes": 5}
    assert record["results"]["sampling, as saved"]["equal"] == 1


def test_verify_makes_sure_of_a_place_for_the_figures_before_anything_is_loaded(tmp_path):
    arguments = [tmp_path / "missing", "--prompts", tmp_path / "missing.jsonl"]
    message = error_of("verify", *arguments, "--output", tmp_path / "nowhere" / "figures.json")
    assert f"cannot be written: there is no folder {tmp_path / 'nowhere'}." in message


def test_verify_in_sixteen_bits_fails_only_where_rounding_is_no_excuse(
    folder, checkpoint, tmp_path
):
    figures = tmp_path / "figures.json"
    arguments = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 3, "--max_new_tokens", 16]
    result = lmtp("verify", checkpoint, *arguments, "--dtype", "bfloat16", "--output", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())["results"]["greedy, tree"]
    assert found["equal"] <= found["prompts"] == 3
    assert not any(difference["is_error"] for difference in found["differences"])


def test_verify_fails_where_texts_differ(folder, checkpoint, monkeypatch):
    monkeypatch.setattr(
        "modeling_lmtp.selection_lmtp.TokenSelector.is_plain_greedy", property(lambda self: False)
    )
    select = "modeling_lmtp.selection_lmtp.TokenSelector.select"
    monkeypatch.setattr(select, lambda self, scores: scores.argmin(dim=-1))
    arguments = ["--prompts", folder / "prompts.jsonl", "--num_prompts", 1, "--max_new_tokens", 4]
    result = lmtp("verify", checkpoint, *arguments)
    assert result.exit_code == 1
    assert "0 of 1" in result.output


def test_train_continues_the_heads_of_a_checkpoint(folder, answers, tmp_path):
    model = LMTPForCausalLM.from_backbone(str(folder / "backbone"), num_leap_heads=2)
    model.save_pretrained(tmp_path / "new")
    tiny_tokenizer().save_pretrained(tmp_path / "new")
    trained = lmtp("train", tmp_path / "new", answers, tmp_path / "out", "--held_out", 0)
    assert trained.exit_code == 0, trained.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.leap_offsets == (3, 5)


def test_a_full_output_folder_is_refused_and_kept(folder, answers, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    message = error_of("train", folder / "backbone", answers, tmp_path / "out")
    assert "already holds something" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_errors_are_one_line_that_says_what_to_do(folder, answers, checkpoint, tmp_path):
    backbone = folder / "backbone"
    assert "There are no prompts to answer" in error_of("distill", backbone, tmp_path / "a.jsonl")
    assert "has no leap heads" in error_of("generate", backbone, "hello")
    assert "The prompt is empty" in error_of("generate", checkpoint, " ")
    again = error_of("train", checkpoint, answers, tmp_path / "t", "--leap_offsets", 2, 3)
    assert "has leap heads already" in again
    few = error_of("verify", checkpoint, "--prompts", folder / "prompts.jsonl")
    assert "holds 6 prompts, but 20 are needed" in few
    assert not any(tmp_path.iterdir())


def test_a_prompt_row_without_the_field_is_named_by_file_and_line(folder, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "x"}\n{"question": "y"}\n')
    message = error_of("distill", folder / "backbone", tmp_path / "a.jsonl", "--prompts", prompts)
    assert re.search(r"p\.jsonl:2: .*question", message)
