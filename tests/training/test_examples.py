import json

import pytest
from tiny import tiny_tokenizer

from modeling_lmtp.conversion.prompts import render_prompt
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.examples import (
    AnswerDataset,
    Example,
    collate,
    draft_vocabulary,
    split_examples,
)

END = 7


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_example_is_the_rendered_prompt_the_answer_and_the_end_of_a_finished_one(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "one", "response": "two three", "finished": True},
        {"prompt": "one", "response": "two three", "finished": False},
    ]
    whole, cut = read_examples(write_rows(tmp_path / "a.jsonl", rows), tokenizer, END)
    prompt = render_prompt(tokenizer, "one")
    answer = tokenizer("two three", add_special_tokens=False)["input_ids"]
    assert whole == Example([*prompt, *answer, END], len(prompt))
    assert cut == Example([*prompt, *answer], len(prompt))


def test_long_examples_are_cut_and_those_without_room_for_an_answer_left_out(tmp_path):
    tokenizer = tiny_tokenizer()
    prompt_length = len(render_prompt(tokenizer, "one"))
    rows = [
        {"prompt": "one", "response": "two " * 50},
        {"prompt": "a much longer prompt " * 20, "response": "two"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    [example] = read_examples(path, tokenizer, END, max_length=prompt_length + 5)
    assert len(example.input_ids) == prompt_length + 5
    with pytest.raises(ValueError, match="holds no answer that fits in 3 tokens"):
        read_examples(path, tokenizer, END, max_length=3)


@pytest.mark.parametrize(
    "row", [{"prompt": "x"}, {"response": "x"}, {"prompt": "x", "response": 3}], ids=str
)
def test_a_row_without_a_field_is_named_by_file_and_line(tmp_path, row):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x", "response": "y"}, row])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected text in the field"):
        read_examples(path, tiny_tokenizer(), END)


def test_only_the_answer_is_a_target_unless_prompts_are_asked_for():
    example = Example([5, 6, 7, 8], answer_start=2)
    assert AnswerDataset([example])[0]["labels"] == [-100, -100, 7, 8]
    assert AnswerDataset([example], train_on_prompts=True)[0]["labels"] == [5, 6, 7, 8]


def test_rows_are_padded_on_the_right_and_padding_is_no_target():
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["input_ids"][:, 0].tolist() == [5, 8]


def test_held_out_examples_are_spread_over_the_file_and_not_trained_on():
    examples = [Example([i], 0) for i in range(10)]
    train, held_out = split_examples(examples, 3)
    assert [e.input_ids[0] for e in held_out] == [0, 3, 6]
    assert sorted(e.input_ids[0] for e in train + held_out) == list(range(10))
    assert split_examples(examples, 0) == (examples, [])
    with pytest.raises(ValueError, match="got 10 of 10 examples"):
        split_examples(examples, 10)


def test_the_draft_vocabulary_is_the_answers_most_frequent_tokens_and_then_the_lowest_ids():
    examples = [Example([9, 9, 9, 5, 5, 7, 8], answer_start=3), Example([5, 7], answer_start=0)]
    assert draft_vocabulary(examples, 2, vocab_size=10) == (5, 7)
    assert draft_vocabulary(examples, 5, vocab_size=10) == (0, 1, 5, 7, 8)
    with pytest.raises(ValueError, match="must be from 1 to 10, got 11"):
        draft_vocabulary(examples, 11, vocab_size=10)
