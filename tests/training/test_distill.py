"""Self-distillation: what is answered, what a stopped run leaves behind, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.prompts import Prompt, render_prompt
from modeling_lmtp.training import distill as distill_module
from modeling_lmtp.training.distill import (
    DistillSettings,
    append_rows,
    distill,
    manifest_path,
    model_fingerprint,
    model_identity,
    read_rows,
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


def test_batched_answers_equal_those_of_each_prompt_alone(model, tokenizer, tmp_path):
    report = run(model, tokenizer, tmp_path / "out.jsonl", GREEDY)
    rows = {row["prompt"]: row for row in read_rows(tmp_path / "out.jsonl")}
    assert set(rows) == set(TEXTS)
    for text, row in rows.items():
        ids = answer_alone(model, tokenizer, text, GREEDY.max_new_tokens)
        ended = ids[-1] in model.generation_config.eos_token_id
        assert row["response"] == tokenizer.decode(ids[:-1] if ended else ids)
        assert (row["prompt_ids"], row["response_ids"]) == (render_prompt(tokenizer, text), ids)
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


def test_sampling_options_of_the_checkpoint_are_ignored(model, tokenizer, tmp_path):
    run(model, tokenizer, tmp_path / "plain.jsonl", GREEDY)
    opinionated = tiny_llama()
    opinionated.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id,
        do_sample=True,
        temperature=3.0,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(200)),
        guidance_scale=1.5,
        min_p=0.5,
        sequence_bias=[[[5], 9.0]],
        max_time=1e-9,
        use_lmtp=True,
        acceptance_rule="typical",
    )
    before = opinionated.generation_config.to_dict()
    run(opinionated, tokenizer, tmp_path / "opinionated.jsonl", GREEDY)
    assert (tmp_path / "opinionated.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert opinionated.generation_config.to_dict() == before


def test_sampled_answers_depend_only_on_the_seed(model, tokenizer, tmp_path):
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


def test_each_batch_samples_with_its_own_seed(model, tokenizer, tmp_path):
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
def test_a_killed_run_resumes_to_the_same_file(model, tokenizer, tmp_path, settings):
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


def test_a_kill_in_the_middle_of_a_run_keeps_the_answers_so_far(
    model, tokenizer, tmp_path, monkeypatch
):
    run(model, tokenizer, tmp_path / "whole.jsonl", SAMPLED)
    calls, generate_ids = [], distill_module.generate_ids

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_ids(*args, **kwargs)

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("modeling_lmtp.training.distill.generate_ids", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, output, SAMPLED)
    assert len(read_rows(output)) == SAMPLED.batch_size
    assert run(model, tokenizer, output, SAMPLED).new_rows == 2 * len(TEXTS) - SAMPLED.batch_size
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_generates_nothing(model, tokenizer, tmp_path, monkeypatch):
    run(model, tokenizer, tmp_path / "out.jsonl", GREEDY)
    monkeypatch.setattr("modeling_lmtp.training.distill.generate_ids", None)
    assert run(model, tokenizer, tmp_path / "out.jsonl", GREEDY).new_rows == 0


def test_a_run_with_other_library_versions_adds_them_to_the_manifest(model, tokenizer, tmp_path):
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
        ({"model": tiny_llama(seed=1)}, "model_fingerprint was "),
        ({"settings": replace(GREEDY, seed=7)}, "settings.seed was 0 and is 7 now"),
        ({"settings": SAMPLED}, r"temperature was 0.0 and is 1.2 now; .*top_p"),
        ({"prompts": PROMPTS[1:]}, "prompts_sha256 was "),
        ({"tokenizer": tiny_tokenizer(chat_template=None)}, "tokenizer_sha256 was "),
    ],
    ids=["model", "seed", "temperature", "prompts", "tokenizer"],
)
def test_the_output_of_another_run_is_refused_and_unchanged(
    model, tokenizer, tmp_path, change, message
):
    output = tmp_path / "out.jsonl"
    same = {"model": model, "tokenizer": tokenizer, "settings": GREEDY, "prompts": PROMPTS}
    run(**same, output=output)
    output.write_bytes(output.read_bytes()[:-9])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message) as caught:
        run(**{**same, **change}, output=output)
    assert "Choose another output, or delete" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_without_manifest_is_refused_and_unchanged(model, tokenizer, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(ValueError, match=r"exists without out.jsonl.manifest.json"):
        run(model, tokenizer, output, GREEDY)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_missing_prompts_and_wrong_file_names_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="prompts must hold at least one prompt, got none"):
        run(model, tokenizer, tmp_path / "out.jsonl", GREEDY, [])
    with pytest.raises(ValueError, match=r"output must be a file name that ends in \.jsonl"):
        run(model, tokenizer, tmp_path / "out.jsonl.gz", GREEDY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": 1, "top_p": 0}, "top_p must be more than 0 and at most 1, got 0"),
        ({"magpie_top_p": 1.5}, "magpie_top_p must be more than 0 and at most 1, got 1.5"),
        ({"magpie_temperature": 0}, "magpie_temperature must be more than 0, got 0"),
        ({"num_answers": 2}, r"num_answers must be 1 with temperature=0 \(greedy\), got 2"),
        ({"top_p": 0.5}, r"top_p must be 1 with temperature=0 \(greedy\), got 0.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**wrong)


def test_the_fingerprint_distinguishes_models_and_dtypes(model):
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
        ('{"id": "b"}\n', r"rows.jsonl:2: field 'kind' must be .*, got None.*\['id'\]"),
        (
            json.dumps({**GOOD_ROW, "finished": 1}),
            r"rows.jsonl:2: field 'finished' must be bool, got 1",
        ),
    ],
    ids=["cut off", "not JSON", "no object", "missing field", "wrong type"],
)
def test_malformed_rows_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD_ROW) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_leap_heads_do_not_change_the_identity_of_a_model(model, tokenizer, tmp_path):
    with_heads = LMTPForCausalLM.from_backbone(model, leap_offsets=(2,))
    assert model_identity(with_heads, tokenizer) == model_identity(model, tokenizer)


def test_answers_end_at_the_last_position_of_the_model(tokenizer, tmp_path):
    longest = max(len(render_prompt(tokenizer, text)) for text in TEXTS)
    config = GPT2Config(n_positions=longest + 3, vocab_size=320, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = []
    run(model, tokenizer, tmp_path / "out.jsonl", GREEDY)
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == len(TEXTS)
    assert {row["tokens"] for row in rows[:4]} == {3}  # the first batch has the longest prompt
    assert not any(row["finished"] for row in rows)
    model.config.n_positions = longest
    with pytest.raises(
        ValueError, match=rf"than the model has positions \({longest}\), got {longest} for"
    ):
        run(model, tokenizer, tmp_path / "other.jsonl", GREEDY)
    assert not (tmp_path / "other.jsonl").exists()
