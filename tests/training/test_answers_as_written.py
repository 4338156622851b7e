"""Heads learn the tokens that the backbone read and wrote, not what their text becomes when tokenized."""

import json
from datetime import datetime

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer
from tokenizers import AddedToken

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.prompts import Prompt, render_prompt
from modeling_lmtp.training import distill as distilling
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.distill import DistillSettings, distill, manifest_path

END = 2
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)


def answer(model, tokenizer, output, *texts, **settings):
    prompts = [Prompt(text) for text in texts]
    chosen = DistillSettings(**{"max_new_tokens": 20, **settings})
    return distill(model, tokenizer, prompts, output, chosen, progress=False)


def steered(tokenizer, *ids):
    """A model that writes these tokens."""
    model, planned = tiny_llama(len(tokenizer)), iter(ids)

    def steer(module, args, output):
        output.logits = torch.full_like(output.logits, -9.0)
        output.logits[:, -1, next(planned)] = 9.0
        return output

    model.register_forward_hook(steer)
    return model


def test_special_tokens_inside_an_answer_are_learned(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|channel|>", special=True)])
    marker = tokenizer.convert_tokens_to_ids("<|channel|>")
    sea = tokenizer("the sea")["input_ids"]
    output = tmp_path / "a.jsonl"
    answer(steered(tokenizer, *sea, marker, *sea, END), tokenizer, output, "Hi")
    assert json.loads(output.read_text())["response"] == "the sea<|channel|>the sea"
    [example] = read_examples(output, tokenizer, END)
    assert example.input_ids[example.answer_start :] == [*sea, marker, *sea, END]


def test_answers_are_read_back_as_the_tokens_that_were_sampled(tmp_path):
    tokenizer, output = tiny_tokenizer(), tmp_path / "a.jsonl"
    # Three tokens whose text tokenizes as one
    pieces = [tokenizer(letter)["input_ids"][0] for letter in "the"]
    assert tokenizer(tokenizer.decode(pieces))["input_ids"] != pieces
    answer(steered(tokenizer, *pieces, END), tokenizer, output, "Hi")
    [example] = read_examples(output, tokenizer, END)
    assert example.input_ids[example.answer_start :] == [*pieces, END]


@pytest.mark.parametrize("change", [{"response": "the wind"}, {"response_ids": [9999]}], ids=str)
def test_ids_that_are_not_those_of_the_text_are_not_learned(tmp_path, change):
    tokenizer, output = tiny_tokenizer(), tmp_path / "a.jsonl"
    sea = tokenizer("the sea")["input_ids"]
    answer(steered(tokenizer, *sea, END), tokenizer, output, "Hi")
    row = {**json.loads(output.read_text()), **change}
    output.write_text(json.dumps(row) + "\n")
    [example] = read_examples(output, tokenizer, END)
    expected = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    assert example.input_ids[example.answer_start :] == [*expected, END]


class Clock(datetime):
    day = 1

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 11, cls.day, 12)


def test_a_template_that_writes_the_date_writes_that_of_the_first_day(tmp_path, monkeypatch):
    tokenizer, output = tiny_tokenizer(chat_template=DATED), tmp_path / "a.jsonl"
    monkeypatch.setattr(distilling, "datetime", Clock)
    answer(tiny_llama(), tokenizer, output, "Hi", "Ho", max_new_tokens=4)
    whole = output.read_text()
    assert "Today is 01 Nov 2026" in tokenizer.decode(
        json.loads(whole.splitlines()[0])["prompt_ids"]
    )
    output.write_text(whole.splitlines(keepends=True)[0])
    monkeypatch.setattr(Clock, "day", 25)
    assert answer(tiny_llama(), tokenizer, output, "Hi", "Ho", max_new_tokens=4).new_rows == 1
    assert output.read_text() == whole
    for example in read_examples(output, tokenizer, END):
        assert "Today is 01 Nov 2026" in tokenizer.decode(example.input_ids)
    assert json.loads(manifest_path(output).read_text())["rendered_at"].startswith("2026-11-01")


def test_a_template_in_another_mode_is_another_run(tmp_path):
    output = tmp_path / "a.jsonl"
    answer(tiny_llama(), tiny_tokenizer(), output, "Hi", max_new_tokens=4)
    manifest = json.loads(manifest_path(output).read_text())
    assert "rendered_at" not in manifest
    manifest_path(output).write_text(json.dumps({**manifest, "rendered_sha256": "another"}))
    with pytest.raises(ValueError, match="rendered_sha256"):
        answer(tiny_llama(), tiny_tokenizer(), output, "Hi", max_new_tokens=4)


def test_templates_of_content_parts_render_the_prompt():
    tokenizer = tiny_tokenizer(chat_template=PARTS)
    question = render_prompt(tokenizer, "What is the capital?")
    assert question != render_prompt(tokenizer, "Write a poem")
    expected = "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant"
    assert tokenizer.decode(question) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<|im_start|>assistant\n", "renders a user turn without its text"),
        ("{{ raise_exception('no user turn alone') }}", "user turn alone: no user turn alone"),
        ("{% for m in messages %", "cannot render a user turn alone"),
    ],
    ids=["without text", "refuses", "malformed"],
)
def test_templates_that_cannot_render_a_prompt_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        render_prompt(tiny_tokenizer(chat_template=template), "Hi")


@pytest.mark.parametrize("pad_token_id", [320, -1])
def test_a_padding_id_outside_the_vocabulary_pads_with_another(tmp_path, pad_token_id):
    model, tokenizer = LMTPForCausalLM.from_backbone(tiny_llama(320)), tiny_tokenizer()
    texts = ("Hi", "What is the capital of France?")
    answer(model, tokenizer, tmp_path / "a.jsonl", *texts, max_new_tokens=4)
    model.generation_config.pad_token_id = pad_token_id
    answer(model, tokenizer, tmp_path / "b.jsonl", *texts, max_new_tokens=4)
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()
