"""Prompts: read from files, rendered, and written by the model itself."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, START_OF_TURN, tiny_llama, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from modeling_lmtp.conversion.prompts import (
    Prompt,
    answer_end_id,
    read_json_lines,
    read_prompts,
    render_prompt,
)
from modeling_lmtp.training import writers as writers_module
from modeling_lmtp.training.distill import (
    DistillSettings,
)
from modeling_lmtp.training.self_written import self_written_prompts
from modeling_lmtp.training.writers import ModelWriter


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def write_prompts(path: Path, *rows: object) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_prompts_are_read_with_their_kind(tmp_path, name):
    path = write_prompts(tmp_path / name, {"prompt": "a", "kind": "math"}, {"prompt": "b", "x": 1})
    assert read_prompts(path) == [Prompt("a", "math"), Prompt("b")]


def test_prompts_are_read_from_the_given_field(tmp_path):
    assert read_prompts(write_prompts(tmp_path / "p.jsonl", {"q": "a"}), "q") == [Prompt("a")]


SPEC_BENCH = [
    {
        "question_id": 81,
        "category": "writing",
        "turns": ["Write a haiku.", "Now without the letter e."],
    },
    {
        "question_id": 201,
        "category": "translation",
        "turns": ["Translate: Guten Tag."],
        "reference": [],
    },
]
SPEED_BENCH = [
    {
        "question_id": "4f1c", "category": "coding", "sub_category": "python", "source": "self",
        "turns": ["Sort a list.", "In reverse."], "src_id": "1", "difficulty": None, "multiturn": True,
    },
    {"question_id": "9ab0", "category": "math", "turns": ["What is 6 times 7?"], "multiturn": False},
]  # fmt: skip


def test_the_first_turns_of_spec_bench_and_speed_bench_are_prompts(tmp_path):
    path = write_prompts(tmp_path / "question.jsonl", *SPEC_BENCH)
    assert read_prompts(path) == [
        Prompt("Write a haiku.", "writing"), Prompt("Translate: Guten Tag.", "translation"),
    ]  # fmt: skip
    path = write_prompts(tmp_path / "speed_bench.jsonl", *SPEED_BENCH)
    assert read_prompts(path) == [
        Prompt("Sort a list.", "coding"), Prompt("What is 6 times 7?", "math"),
    ]  # fmt: skip


def test_the_field_of_the_prompt_and_the_kind_go_before_turns_and_category(tmp_path):
    row = {"prompt": "a", "turns": ["b"], "kind": "maths", "category": "c"}
    assert read_prompts(write_prompts(tmp_path / "p.jsonl", row)) == [Prompt("a", "maths")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": []}, r"p.jsonl:2: expected a non-empty string in field 'prompt', got None"),
        ({"turns": [{"role": "user"}]}, r"p.jsonl:2: expected a non-empty string .* got {'role'"),
        (
            {"turns": ["b"], "category": 3},
            r"p.jsonl:2: expected a string in field 'category', got 3",
        ),
        (
            {
                "turns": [
                    "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
                ]
            },
            r"p.jsonl:2: SPEED-Bench holds this prompt as a reference .*prepare_data.py",
        ),
        ({"text": "b", "id": 1}, r"p.jsonl:2: .*field 'prompt', got None; .*\['id', 'text'\]"),
        ({"prompt": " "}, r"p.jsonl:2: expected a non-empty string in field 'prompt', got ' '"),
        ({"prompt": ["b"]}, r"p.jsonl:2: expected a non-empty string .* got \['b'\]"),
        ({"prompt": "b", "kind": 3}, r"p.jsonl:2: expected a string in field 'kind', got 3"),
        ("b", r"p.jsonl:2: expected a JSON object, got str"),
        ({"prompt": "a \ud83d b"}, r"p.jsonl:2: .* surrogates not allowed"),
    ],
    ids=[
        "no turns",
        "turns of roles",
        "category",
        "reference",
        "missing",
        "blank",
        "list",
        "kind",
        "no object",
        "half a pair",
    ],
)
def test_the_error_names_file_and_line_of_an_invalid_prompt(tmp_path, row, message):
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


DAMAGED = {
    "data": (
        lambda data: data + data[:10] + b"\xff" * 20,  # a second part: header and no block
        r":[1-9]\d*: the gzip data is damaged \(.*invalid block type\) after here$",
    ),
    "checksum": (
        lambda data: data[:-8] + bytes(4) + data[-4:],
        r":[1-9]\d*: the gzip data is damaged \(CRC check failed .*\) after here$",
    ),
    "no gzip": (
        gzip.decompress,
        r":0: the gzip data is damaged \(Not a gzipped file .*\) after here; .* remove \.gz",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_error_names_file_and_line_of_damaged_gzip_data(tmp_path, kind):
    damage, message = DAMAGED[kind]
    rows = [{"prompt": str(i**5)} for i in range(9999)]
    path = write_prompts(tmp_path / "p.jsonl.gz", *rows)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"p\.jsonl\.gz{message}"):
        read_prompts(path)
    errors = []
    read = [row for _, row in read_json_lines(path, errors.append)]
    assert (len(errors), rows[: len(read)]) == (1, read)


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
def test_a_rendered_prompt_has_exactly_the_bos_of_its_template(template, text):
    tokenizer = with_bos(template)
    assert tokenizer.decode(render_prompt(tokenizer, "Hi é")) == text


BRACKETS = "{{ '[' + messages[0]['content'] + ')' }}"  # closes a turn with ordinary text
OPEN_END = "{{ '[' + messages[0]['content'] }}{% if add_generation_prompt %}{{ ')' }}{% endif %}"


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, BRACKETS, OPEN_END], ids=["special", "text", "header of answer"]
)
def test_the_model_writes_prompts_itself(model, template):
    tokenizer = tiny_tokenizer(chat_template=template)
    settings = DistillSettings(batch_size=32, magpie_max_tokens=48)
    prompts = self_written_prompts(ModelWriter(model, tokenizer), 3, settings)
    assert len({prompt.text for prompt in prompts}) == 3
    assert {prompt.kind for prompt in prompts} == {"self-written"}
    for prompt in prompts:
        assert prompt.text == prompt.text.strip() != ""
        assert ")" not in prompt.text or template == CHAT_TEMPLATE
        assert not any(token in prompt.text for token in tokenizer.all_special_tokens)
    assert self_written_prompts(ModelWriter(model, tokenizer), 3, settings) == prompts
    assert (
        self_written_prompts(ModelWriter(model, tokenizer), 3, replace(settings, seed=1)) != prompts
    )


def scripted(monkeypatch, tokenizer, batches):
    """Let the model write the given texts, batch by batch, and then the last batch for ever."""
    calls = []

    def generate(_model, _tokenizer, headers, *_args, **_kwargs):
        texts = batches[min(len(calls), len(batches) - 1)]
        calls.append(tokenizer.decode(headers[0]))
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    monkeypatch.setattr(writers_module, "generate_ids", generate)
    return calls


def test_unusable_prompts_are_dropped_and_replaced(model, tokenizer, monkeypatch):
    first = [f"One{END_OF_TURN}", f" \n{END_OF_TURN}", "cut off", f"One {END_OF_TURN}"]
    second = [f"a{START_OF_TURN}b{END_OF_TURN}", f"Two{END_OF_TURN}", f"Three{END_OF_TURN}", ""]
    calls = scripted(monkeypatch, tokenizer, [first, second])
    prompts = self_written_prompts(ModelWriter(model, tokenizer), 2, DistillSettings(batch_size=4))
    assert [prompt.text for prompt in prompts] == ["One", "Two"]
    assert calls == [f"{START_OF_TURN}user\n"] * 2


def test_a_space_before_the_turn_is_left_to_its_first_word(model, monkeypatch):
    template = "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}"
    tokenizer = tiny_tokenizer(chat_template=template)
    calls = scripted(monkeypatch, tokenizer, [[" One [/INST] and more"]])
    prompts = self_written_prompts(ModelWriter(model, tokenizer), 1, DistillSettings(batch_size=1))
    assert (calls, prompts[0].text) == (["[INST]"], "One")


def test_a_model_that_repeats_itself_warns_and_stops(model, tokenizer, monkeypatch):
    calls = scripted(monkeypatch, tokenizer, [[f"One{END_OF_TURN}"]])
    with pytest.warns(
        UserWarning, match="only 1 of 2 prompts of the kind 'self-written' in 20 samples"
    ):
        prompts = self_written_prompts(
            ModelWriter(model, tokenizer), 2, DistillSettings(batch_size=1)
        )
    assert [prompt.text for prompt in prompts] == ["One"]
    assert len(calls) == 20


def test_a_model_that_writes_no_prompt_raises(model, tokenizer, monkeypatch):
    scripted(monkeypatch, tokenizer, [["never closed"]])
    with pytest.raises(RuntimeError, match=r"0 of 2 prompts.*magpie_max_tokens=128"):
        self_written_prompts(ModelWriter(model, tokenizer), 2, DistillSettings())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "must have a chat template"),
        ("{{ messages[0]['content'] }}", "does not show where a user turn begins and ends"),
        ("{{ '[' + messages[0]['content'] * 2 + ']' }}", "does not show where a user turn begins"),
    ],
    ids=["no template", "bare", "twice"],
)
def test_self_written_prompts_need_a_user_turn_in_the_template(model, template, message):
    with pytest.raises(ValueError, match=f"tokenizer.*{message}"):
        self_written_prompts(
            ModelWriter(model, tiny_tokenizer(chat_template=template)), 1, DistillSettings()
        )


def test_the_number_of_self_written_prompts_is_at_least_one(model, tokenizer):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        self_written_prompts(ModelWriter(model, tokenizer), 0, DistillSettings())


@pytest.mark.parametrize(
    ("ids", "settings", "expected"),
    [
        ([0, 2], {}, 2),  # the chat template's, although it comes last
        ([2, 0], {}, 2),
        ([0, 1], {"chat_template": None, "eos_token": START_OF_TURN}, 1),  # the tokenizer's own
        ([5, 0], {}, 5),  # neither: the first
        (2, {}, 2),
        (None, {}, 2),
        (None, {"eos_token": None}, None),
    ],
)
def test_a_finished_answer_ends_as_the_template_closes_it(ids, settings, expected):
    tokenizer = tiny_tokenizer(**settings)
    model = tiny_llama()
    model.generation_config.eos_token_id = ids
    assert tokenizer.convert_ids_to_tokens([1, 2]) == [START_OF_TURN, END_OF_TURN]
    assert answer_end_id(model, tokenizer) == expected


def test_a_template_that_hides_answers_says_nothing_of_their_end():
    questions_only = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = tiny_tokenizer(chat_template=questions_only, eos_token=END_OF_TEXT)
    model = tiny_llama()
    model.generation_config.eos_token_id = [2, 0]
    assert answer_end_id(model, tokenizer) == 0
