"""Self-distillation: what is answered, what a stopped run leaves behind, what is refused."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, START_OF_TURN, tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from modeling_lmtp.training import prompts as prompts_module
from modeling_lmtp.training.distill import (
    DistillSettings,
    append_rows,
    distill,
    manifest_path,
    model_fingerprint,
    read_rows,
)
from modeling_lmtp.training.prompts import (
    Prompt,
    read_prompts,
    render_prompt,
    self_written_prompts,
)

TEXTS = (
    "Hi",
    "What is the capital of France?",
    "Write a poem",
    "How many legs, é?",
    "a",
    "the sea",
)
PROMPTS = [Prompt(text, "tiny") for text in TEXTS]
GREEDY = DistillSettings(max_new_tokens=10, batch_size=4)
SAMPLED = replace(GREEDY, temperature=1.2, top_p=0.9, num_answers=2)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A model that ends some of its answers early: one of its favourite tokens ends them."""
    model = tiny_llama()
    input_ids = torch.tensor([render_prompt(tiny_tokenizer(), TEXTS[0])])
    config = GenerationConfig(max_new_tokens=6, pad_token_id=2, do_sample=False)
    favourite = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config
    )[0, -1]
    model.generation_config.eos_token_id = [2, int(favourite)]
    return model


def run(model, tokenizer, output, settings, prompts=PROMPTS):
    return distill(model, tokenizer, prompts, output, settings, progress=False)


def answer_alone(model, tokenizer, text, max_new_tokens):
    input_ids = torch.tensor([render_prompt(tokenizer, text)])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return output[0, input_ids.shape[1] :].tolist()


def test_batched_answers_are_those_of_each_prompt_alone(model, tokenizer, tmp_path):
    report = run(model, tokenizer, tmp_path / "out.jsonl", GREEDY)
    rows = {row["prompt"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert set(rows) == set(TEXTS)
    for text, row in rows.items():
        ids = answer_alone(model, tokenizer, text, GREEDY.max_new_tokens)
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["tokens"] == len(ids)
        assert row["finished"] == (ids[-1] in model.generation_config.eos_token_id)
    assert {row["finished"] for row in rows.values()} == {True, False}
    assert report.rows == report.new_rows == len(TEXTS)
    assert report.tokens == sum(row["tokens"] for row in rows.values())


def test_longest_prompts_come_first(model, tokenizer, tmp_path):
    run(model, tokenizer, tmp_path / "out.jsonl", GREEDY)
    lengths = [
        len(render_prompt(tokenizer, row["prompt"])) for row in read_rows(tmp_path / "out.jsonl")
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_sampling_options_of_the_checkpoint_do_not_apply(model, tokenizer, tmp_path):
    run(model, tokenizer, tmp_path / "plain.jsonl", GREEDY)
    opinionated = tiny_llama()
    opinionated.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id,
        do_sample=True,
        temperature=3.0,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
    )
    before = opinionated.generation_config.to_dict()
    run(opinionated, tokenizer, tmp_path / "opinionated.jsonl", GREEDY)
    assert (tmp_path / "opinionated.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert opinionated.generation_config.to_dict() == before


def test_sampled_answers_follow_the_seed_and_nothing_else(model, tokenizer, tmp_path):
    state = torch.random.get_rng_state()
    run(model, tokenizer, tmp_path / "first.jsonl", SAMPLED)
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    torch.rand(3)
    run(model, tokenizer, tmp_path / "again.jsonl", SAMPLED, PROMPTS[::-1])
    run(model, tokenizer, tmp_path / "other.jsonl", replace(SAMPLED, seed=1))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "first.jsonl").read_bytes()
    first, second = (
        {row["response"] for row in read_rows(tmp_path / "first.jsonl") if row["prompt"] == text}
        for text in TEXTS[:2]
    )
    assert len(first) == len(second) == SAMPLED.num_answers


def test_each_batch_draws_on_its_own(model, tokenizer, tmp_path):
    settings = replace(SAMPLED, batch_size=1, num_answers=4)
    run(model, tokenizer, tmp_path / "out.jsonl", settings, PROMPTS[1:2])
    assert len({row["response"] for row in read_rows(tmp_path / "out.jsonl")}) == 4


def test_a_model_in_training_mode_answers_in_eval_mode(tokenizer, tmp_path):
    model = tiny_llama(attention_dropout=0.5)
    run(model, tokenizer, tmp_path / "eval.jsonl", GREEDY)
    run(model.train(), tokenizer, tmp_path / "train.jsonl", GREEDY)
    assert (tmp_path / "train.jsonl").read_bytes() == (tmp_path / "eval.jsonl").read_bytes()
    assert model.training


def test_a_tokenizer_without_pad_token_pads_with_the_end_token(tokenizer, tmp_path):
    unpadded = tiny_llama(pad_token_id=None)
    assert unpadded.generation_config.pad_token_id is None
    run(unpadded, tiny_tokenizer(pad_token=None), tmp_path / "out.jsonl", GREEDY)
    for row in read_rows(tmp_path / "out.jsonl"):
        ids = answer_alone(unpadded, tokenizer, row["prompt"], GREEDY.max_new_tokens)
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_repeated_prompts_are_answered_once_and_counted(model, tokenizer, tmp_path):
    report = run(model, tokenizer, tmp_path / "out.jsonl", GREEDY, [*PROMPTS, Prompt("Hi", "b")])
    assert (report.rows, report.duplicate_prompts) == (len(PROMPTS), 1)
    assert {row["kind"] for row in read_rows(tmp_path / "out.jsonl")} == {"tiny"}


def kill_points(data: bytes) -> list[int]:
    """Byte offsets of a kill: at line breaks, beside them, and within lines (also in a letter)."""
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    near = {end + step for end in ends for step in (-1, 0, 1)}
    in_letter = {i + 1 for i, byte in enumerate(data) if byte == "é".encode()[0]}
    offsets = {0, 7, len(data) // 3, len(data) // 2, *near, *in_letter}
    return sorted(offset for offset in offsets if offset < len(data))


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_killed_run_ends_up_like_one_that_was_never_killed(model, tokenizer, tmp_path, settings):
    output = tmp_path / "out.jsonl"
    run(model, tokenizer, output, settings)
    whole, manifest = output.read_bytes(), json.loads(manifest_path(output).read_text())
    rows = read_rows(output)
    assert len({row["id"] for row in rows}) == len(rows) == len(TEXTS) * settings.num_answers
    for offset in kill_points(whole):
        output.write_bytes(whole[:offset])
        report = run(model, tokenizer, output, settings)
        assert output.read_bytes() == whole, f"killed after {offset} bytes"
        assert report.new_rows == len(rows) - whole[:offset].count(b"\n")
        assert report.tokens == sum(row["tokens"] for row in rows)
        assert json.loads(manifest_path(output).read_text()) == manifest


def test_a_kill_in_the_middle_of_a_run_keeps_what_was_answered(
    model, tokenizer, tmp_path, monkeypatch
):
    run(model, tokenizer, tmp_path / "whole.jsonl", SAMPLED)
    calls = []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return prompts_module.generate_ids(*args, **kwargs)

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.distill.generate_ids", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, output, SAMPLED)
    assert len(read_rows(output)) == SAMPLED.batch_size
    assert run(model, tokenizer, output, SAMPLED).new_rows == 2 * len(TEXTS) - SAMPLED.batch_size
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_answers_nothing_again(model, tokenizer, tmp_path, monkeypatch):
    run(model, tokenizer, tmp_path / "out.jsonl", GREEDY)
    monkeypatch.setattr("modeling_lmtp.training.distill.generate_ids", None)
    assert run(model, tokenizer, tmp_path / "out.jsonl", GREEDY).new_rows == 0


def test_a_run_under_other_versions_adds_them_to_the_manifest(model, tokenizer, tmp_path):
    output = tmp_path / "out.jsonl"
    run(model, tokenizer, output, GREEDY)
    manifest = json.loads(manifest_path(output).read_text())
    older = {**manifest["versions"][0], "transformers": "5.0.0"}
    manifest_path(output).write_text(json.dumps({**manifest, "versions": [older]}))
    run(model, tokenizer, output, GREEDY)
    versions = json.loads(manifest_path(output).read_text())["versions"]
    assert versions == [manifest["versions"][0], older]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": tiny_llama(seed=1)}, "model_fingerprint is "),
        ({"settings": replace(GREEDY, seed=7)}, "settings.seed is 0 there and 7 now"),
        ({"settings": SAMPLED}, r"temperature is 0.0 there and 1.2 now; .*top_p"),
        ({"prompts": PROMPTS[1:]}, "prompts_sha256 is "),
        ({"tokenizer": tiny_tokenizer(chat_template=None)}, "tokenizer_sha256 is "),
    ],
    ids=["model", "seed", "temperature", "prompts", "tokenizer"],
)
def test_an_output_made_differently_is_refused_untouched(
    model, tokenizer, tmp_path, change, message
):
    output = tmp_path / "out.jsonl"
    same = {"model": model, "tokenizer": tokenizer, "settings": GREEDY, "prompts": PROMPTS}
    run(**same, output=output)
    output.write_bytes(output.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as caught:
        run(**{**same, **change}, output=output)
    assert "Choose another output or delete" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_without_manifest_is_refused_untouched(model, tokenizer, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(ValueError, match=r"exists without out.jsonl.manifest.json"):
        run(model, tokenizer, output, GREEDY)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_to_answer_and_wrong_file_names_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        run(model, tokenizer, tmp_path / "out.jsonl", GREEDY, [])
    with pytest.raises(ValueError, match=r"output: expected a file name that ends in \.jsonl"):
        run(model, tokenizer, tmp_path / "out.jsonl.gz", GREEDY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, got -1"),
        ({"temperature": -0.1}, r"temperature: expected 0 \(greedy\) or more, got -0.1"),
        ({"temperature": 1, "top_p": 0}, "top_p: expected above 0 and at most 1, got 0"),
        ({"magpie_top_p": 1.5}, "magpie_top_p: expected above 0 and at most 1, got 1.5"),
        ({"magpie_temperature": 0}, "magpie_temperature: expected more than 0, got 0"),
        ({"num_answers": 2}, r"num_answers: expected 1 with temperature=0 \(greedy\)"),
        ({"top_p": 0.5}, r"top_p: expected 1.0 with temperature=0 \(greedy\)"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**wrong)


def test_the_fingerprint_tells_models_and_dtypes_apart(model):
    assert model_fingerprint(tiny_llama()) == model_fingerprint(model)
    assert model_fingerprint(tiny_llama(seed=1)) != model_fingerprint(model)
    assert model_fingerprint(tiny_llama().bfloat16()) != model_fingerprint(model)


GOOD_ROW = {
    "id": "a",
    "kind": None,
    "prompt": "é\u2028\n",
    "response": "",
    "finished": True,
    "tokens": 1,
}


def test_appended_rows_are_read_back(tmp_path):
    for _ in range(2):
        append_rows(tmp_path / "rows.jsonl", [GOOD_ROW])
    assert read_rows(tmp_path / "rows.jsonl") == [GOOD_ROW, GOOD_ROW]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl:2: not JSON.*the line is cut off"),
        ("oops\n", r"rows.jsonl:2: not JSON: Expecting value"),
        ("[1]\n", r"rows.jsonl:2: expected a JSON object, got list"),
        ('{"id": "b"}\n', r"rows.jsonl:2: expected .* in field 'kind', got None.*\['id'\]"),
        (json.dumps({**GOOD_ROW, "finished": 1}), r"rows.jsonl:2: expected bool in .*'finished'"),
    ],
    ids=["cut off", "not JSON", "no object", "missing field", "wrong type"],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD_ROW) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def write_prompts(path: Path, *rows: object) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prompts_are_read_with_their_kind(tmp_path, name):
    path = write_prompts(tmp_path / name, {"prompt": "a", "kind": "math"}, {"prompt": "b", "x": 1})
    assert read_prompts(path) == [Prompt("a", "math"), Prompt("b")]


def test_prompts_are_read_from_the_field_asked_for(tmp_path):
    assert read_prompts(write_prompts(tmp_path / "p.jsonl", {"q": "a"}), "q") == [Prompt("a")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "b", "id": 1}, r"p.jsonl:2: .*field 'prompt', got None; .*\['id', 'text'\]"),
        ({"prompt": " "}, r"p.jsonl:2: expected a non-empty string in field 'prompt', got ' '"),
        ({"prompt": ["b"]}, r"p.jsonl:2: expected a non-empty string .* got \['b'\]"),
        ({"prompt": "b", "kind": 3}, r"p.jsonl:2: expected a string in field 'kind', got 3"),
        ("b", r"p.jsonl:2: expected a JSON object, got str"),
    ],
    ids=["missing", "blank", "list", "kind", "no object"],
)
def test_wrong_prompts_are_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write_prompts(tmp_path / "p.jsonl", {"prompt": "a"}, row))


def test_prompt_files_without_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"p.jsonl: holds no prompts"):
        read_prompts(write_prompts(tmp_path / "p.jsonl"))
    with pytest.raises(ValueError, match=r"p.txt: expected a file name that ends in \.jsonl"):
        read_prompts(write_prompts(tmp_path / "p.txt"))
    cut = write_prompts(tmp_path / "p.jsonl.gz", *[{"prompt": str(i)} for i in range(999)])
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"p.jsonl.gz:\d+: the gzip data ends early"):
        read_prompts(cut)


def with_bos(chat_template):
    """Return a tokenizer that puts <|endoftext|> before everything it encodes, as Llama's does."""
    tokenizer = tiny_tokenizer(bos_token=END_OF_TEXT, chat_template=chat_template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}:", f"{END_OF_TEXT}Hi é:"),
        (CHAT_TEMPLATE, f"{START_OF_TURN}user\nHi é{END_OF_TURN}\n{START_OF_TURN}assistant\n"),
        (None, f"{END_OF_TEXT}Hi é"),
    ],
    ids=["template with BOS", "template without BOS", "no template"],
)
def test_a_rendered_prompt_has_the_bos_that_its_template_asks_for(template, text):
    tokenizer = with_bos(template)
    assert tokenizer.decode(render_prompt(tokenizer, "Hi é")) == text


BRACKETS = "{{ '[' + messages[0]['content'] + ')' }}"  # closes a turn with ordinary text
OPEN_END = "{{ '[' + messages[0]['content'] }}{% if add_generation_prompt %}{{ ')' }}{% endif %}"


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, BRACKETS, OPEN_END], ids=["special", "text", "header of answer"]
)
def test_the_model_writes_prompts_of_its_own(model, template):
    tokenizer = tiny_tokenizer(chat_template=template)
    settings = DistillSettings(batch_size=32, magpie_max_tokens=48)
    prompts = self_written_prompts(model, tokenizer, 3, settings)
    assert len({prompt.text for prompt in prompts}) == 3
    assert {prompt.kind for prompt in prompts} == {"self-written"}
    for prompt in prompts:
        assert prompt.text == prompt.text.strip() != ""
        assert ")" not in prompt.text or template == CHAT_TEMPLATE
        assert not any(token in prompt.text for token in tokenizer.all_special_tokens)
    assert self_written_prompts(model, tokenizer, 3, settings) == prompts
    assert self_written_prompts(model, tokenizer, 3, replace(settings, seed=1)) != prompts


def scripted(monkeypatch, tokenizer, batches):
    """Let the model write the given texts, batch by batch, and then the last batch for ever."""
    calls = []

    def generate(_model, _tokenizer, headers, *_args, **_kwargs):
        texts = batches[min(len(calls), len(batches) - 1)]
        calls.append(tokenizer.decode(headers[0]))
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    monkeypatch.setattr(prompts_module, "generate_ids", generate)
    return calls


def test_useless_prompts_are_dropped_and_replaced(model, tokenizer, monkeypatch):
    first = [f"One{END_OF_TURN}", f" \n{END_OF_TURN}", "cut off", f"One {END_OF_TURN}"]
    second = [f"a{START_OF_TURN}b{END_OF_TURN}", f"Two{END_OF_TURN}", f"Three{END_OF_TURN}", ""]
    calls = scripted(monkeypatch, tokenizer, [first, second])
    prompts = self_written_prompts(model, tokenizer, 2, DistillSettings(batch_size=4))
    assert [prompt.text for prompt in prompts] == ["One", "Two"]
    assert calls == [f"{START_OF_TURN}user\n"] * 2


def test_a_space_before_the_turn_is_left_to_its_first_word(model, monkeypatch):
    template = "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}"
    tokenizer = tiny_tokenizer(chat_template=template)
    calls = scripted(monkeypatch, tokenizer, [[" One [/INST] and more"]])
    prompts = self_written_prompts(model, tokenizer, 1, DistillSettings(batch_size=1))
    assert (calls, prompts[0].text) == (["[INST]"], "One")


def test_a_model_that_repeats_itself_warns_and_stops(model, tokenizer, monkeypatch):
    calls = scripted(monkeypatch, tokenizer, [[f"One{END_OF_TURN}"]])
    with pytest.warns(UserWarning, match="the model wrote only 1 of 2 prompts in 20 samples"):
        prompts = self_written_prompts(model, tokenizer, 2, DistillSettings(batch_size=1))
    assert [prompt.text for prompt in prompts] == ["One"]
    assert len(calls) == 20


def test_a_model_that_writes_no_prompt_is_an_error(model, tokenizer, monkeypatch):
    scripted(monkeypatch, tokenizer, [["never closed"]])
    with pytest.raises(RuntimeError, match=r"0 of 2 prompts.*magpie_max_tokens=128"):
        self_written_prompts(model, tokenizer, 2, DistillSettings())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0]['content'] }}", "does not show where a user turn begins and ends"),
        ("{{ '[' + messages[0]['content'] * 2 + ']' }}", "does not show where a user turn begins"),
    ],
    ids=["no template", "bare", "twice"],
)
def test_self_written_prompts_need_a_user_turn_in_the_template(model, template, message):
    with pytest.raises(ValueError, match=f"tokenizer: .*{message}"):
        self_written_prompts(model, tiny_tokenizer(chat_template=template), 1, DistillSettings())


def test_the_number_of_self_written_prompts_is_at_least_one(model, tokenizer):
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        self_written_prompts(model, tokenizer, 0, DistillSettings())
