"""Self-distillation through a server: what is asked, what is tried again, what an error leaves."""

from __future__ import annotations

import json
import logging
import re
import threading
from dataclasses import replace

import pytest
from commands import error_of, lmtp
from fake_server import (
    FakeServer,
    answers,
    break_off,
    completion,
    hang_up,
    raw,
    send,
    serving,
    status,
)
from tiny import tiny_tokenizer

from modeling_lmtp.conversion.prompts import Prompt
from modeling_lmtp.training.answers import read_examples
from modeling_lmtp.training.distill import DistillSettings, manifest_path, read_rows
from modeling_lmtp.training.distill_server import distill_from_server
from modeling_lmtp.training.server import Server

TEXTS = ["Hi", "the sea", "A spider asks", "é?", "Paris", "What is the capital of France?"]
PROMPTS = [Prompt(text, "tiny") for text in TEXTS]
SETTINGS = DistillSettings(max_new_tokens=9, batch_size=3)
SAMPLED = replace(SETTINGS, temperature=0.7, top_p=0.9, num_answers=2, seed=5)


@pytest.fixture
def fake():
    return FakeServer()


@pytest.fixture
def server(fake):
    with serving(fake) as url:
        yield Server(url, "served", backoff=0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The answers that an undisturbed server makes of `SAMPLED`."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    with serving(FakeServer()) as url:
        run(Server(url, "served"), output, SAMPLED)
    return output.read_bytes()


def run(server, output, settings=SETTINGS, prompts=PROMPTS):
    return distill_from_server(server, prompts, output, settings, progress=False)


def test_a_server_gets_each_prompt_once_with_the_settings(server, fake, tmp_path):
    output = tmp_path / "out.jsonl"
    report = run(replace(server, url=server.url + "/"), output, SAMPLED)
    assert {path for path, _ in fake.requests} == {"/v1/chat/completions"}
    asked = [request for _, request in fake.requests]
    assert sorted(request["messages"][0]["content"] for request in asked) == sorted(TEXTS * 2)
    seeds = {request.pop("seed") for request in asked}
    assert len(seeds) == 2 * len(TEXTS)
    assert all(0 <= seed < 2**31 for seed in seeds)
    for request in asked:
        (message,) = request.pop("messages")
        assert message["role"] == "user"
        assert not request.pop("skip_special_tokens")
        assert request.pop("return_token_ids")
        assert request == {"model": "served", "temperature": 0.7, "top_p": 0.9, "max_tokens": 9}
    rows = read_rows(output)
    lengths = [len(row["prompt"]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert all(row["response"].startswith(f"{row['prompt']}! ") for row in rows)
    assert {row["kind"] for row in rows} == {"tiny"}
    assert report.rows == report.new_rows == 2 * len(TEXTS)
    assert report.tokens == sum(len(row["response"]) for row in rows)


def test_token_ids_that_the_server_returns_are_recorded(server, fake, tmp_path):
    def with_ids(handler, request):
        reply = completion(request, prompt_token_ids=[5, 6])
        reply["choices"][0]["token_ids"] = [7, 8, 9]
        send(handler, 200, reply)

    fake.faults = [with_ids]
    run(server, tmp_path / "out.jsonl", replace(SETTINGS, batch_size=1), PROMPTS[:2])
    recorded = [
        (row["prompt_ids"], row["response_ids"])
        for row in read_rows(tmp_path / "out.jsonl")
        if "prompt_ids" in row
    ]
    assert recorded == [([5, 6], [7, 8, 9])]  # of the one answer that came with them


def test_the_manifest_names_the_model_of_the_server(server, tmp_path):
    output = tmp_path / "out.jsonl"
    distill_from_server(server, PROMPTS, output, SETTINGS, model="me/big", progress=False)
    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["model"] == "me/big"
    assert (manifest["server"], manifest["server_model"]) == (server.url, "served")
    assert manifest["settings"] == {
        "max_new_tokens": 9,
        "temperature": 0.0,
        "top_p": 1.0,
        "num_answers": 1,
        "seed": 0,
    }
    assert manifest["rows"] == len(TEXTS)


def test_an_answer_is_finished_if_its_finish_reason_is_stop(server, fake, tmp_path):
    fake.faults = [answers(reason="length"), answers(reason="stop"), answers(reason="length")]
    run(server, tmp_path / "out.jsonl")
    finished = [row["finished"] for row in read_rows(tmp_path / "out.jsonl")]
    assert sorted(finished) == [False] * 2 + [True] * (len(TEXTS) - 2)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_limits_the_concurrent_requests(server, fake, tmp_path, batch_size):
    fake.delay = 0.05
    run(server, tmp_path / "out.jsonl", replace(SAMPLED, batch_size=batch_size))
    assert fake.most_under_way == batch_size


def test_the_api_key_is_sent_only_if_it_is_set(server, fake, tmp_path):
    run(server, tmp_path / "without.jsonl")
    assert not any("Authorization" in headers for headers in fake.headers)
    fake.headers.clear()
    run(replace(server, api_key="s3cret"), tmp_path / "with.jsonl")
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer s3cret"}
    assert "s3cret" not in repr(replace(server, api_key="s3cret"))
    assert not any("s3cret" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault",
    [
        status(429),
        status(429, **{"Retry-After": "0"}),
        status(500),
        status(503),
        status(408),
        hang_up,
        break_off,
    ],
    ids=["429", "429 with Retry-After", "500", "503", "408", "hung up", "broken off"],
)
def test_temporary_errors_are_retried(server, fake, tmp_path, whole, fault):
    fake.faults = [None, fault, None, fault, fault]
    run(server, tmp_path / "out.jsonl", SAMPLED)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert len(fake.requests) == 2 * len(TEXTS) + 3


def test_the_backoff_doubles_unless_the_server_sends_retry_after(
    server, fake, tmp_path, monkeypatch
):
    pauses = []

    class Impatient(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    monkeypatch.setattr("modeling_lmtp.training.server.Event", Impatient)
    fake.faults = [status(429, **{"Retry-After": "7"}), hang_up, status(503), None, status(500)]
    run(replace(server, backoff=0.5), tmp_path / "out.jsonl", replace(SETTINGS, batch_size=1))
    assert pauses == [7.0, 1.0, 2.0, 0.5]
    pauses.clear()
    fake.faults = [status(503, **{"Retry-After": "99999"})]
    run(server, tmp_path / "capped.jsonl")
    assert pauses == [60.0]


PERMANENT = {
    "not found": (
        status(404, "no model x"),
        r"rejected the prompt '.+': HTTP 404 .*no model x.*--serv",
    ),
    "bad key": (status(401), r"rejected the prompt .*: HTTP 401 .*OPENAI_API_KEY"),
    "redirect": (status(302, Location="http://127.0.0.1:1/"), "rejected the prompt .*: HTTP 302"),
    "no JSON": (raw(b"<html>"), r"must be a chat completion .* got '<html>'"),
    "no object": (raw(b"[]"), r"must be a chat completion .* got '\[\]'"),
    "no usage": (answers(usage=None), "must be a chat completion"),
    "no finish_reason": (answers(reason=None), "must be a chat completion"),
    "reasoning": (answers(message={"reasoning_content": "hm"}), "without a reasoning parser"),
}


OF_ONE_PROMPT = {
    "null": (answers(message={"content": None}), "reply to the prompt.*must be a chat completion"),
    "no content": (
        answers(message={"content": None, "tool_calls": []}),
        "must be a chat completion",
    ),
    "no choices": (answers(choices=[]), "must be a chat completion"),
    "error with status 200": (raw(b'{"error": "overloaded"}'), "must be a chat completion"),
    "tool call": (
        answers(message={"tool_calls": [{"id": "1"}]}),
        "withheld its answer to the prompt",
    ),
    "refusal": (answers(message={"refusal": "I may not"}), "withheld .*I may not"),
    "filtered": (answers(reason="content_filter"), "withheld .*content_filter"),
    "empty and cut off": (answers(message={"content": ""}, reason="length"), "withheld"),
    "too long": (status(400, "maximum context length"), "rejected the prompt.*maximum context"),
}


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
@pytest.mark.parametrize("name", OF_ONE_PROMPT)
def test_a_prompt_without_an_answer_is_named_and_can_be_skipped(
    server, fake, tmp_path, monkeypatch, caplog, name, bad_rows
):
    fault, message = OF_ONE_PROMPT[name]
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    fake.faults = [None, fault]
    monkeypatch.setattr("modeling_lmtp.training.distill_command.logger", logging.getLogger())
    command = ["distill", "me/big", output, "--prompts", prompts, "--server", server.url]
    result = lmtp(*command, "--batch_size", 1, "--bad_rows", bad_rows)
    row = f"of {prompts}:3 'A spider asks'"  # the second longest
    if bad_rows == "refuse":
        assert result.exit_code == 1
        said = result.stderr.splitlines()[-1]
        assert "skip such rows with --bad_rows skip" in said
        assert len(read_rows(output)) == 1
    else:
        assert result.exit_code == 0, result.output
        said = caplog.text
        assert "5 answers" in result.stdout
    assert row in said
    assert re.search(message, said)
    assert lmtp(*command).exit_code == 0
    assert sorted(row["prompt"] for row in read_rows(output)) == sorted(TEXTS)


def test_a_server_that_answers_no_prompt_is_an_error_even_if_bad_rows_are_skipped(
    server, fake, tmp_path
):
    fake.faults = [status(400)] * len(TEXTS)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    command = [
        "distill",
        "me/big",
        tmp_path / "out.jsonl",
        "--prompts",
        prompts,
        "--bad_rows",
        "skip",
    ]
    assert "answered none of the prompts" in error_of(*command, "--server", server.url)


@pytest.mark.parametrize("name", PERMANENT)
def test_permanent_errors_raise_and_lose_no_answer(server, fake, tmp_path, whole, name):
    fault, message = PERMANENT[name]
    output = tmp_path / "out.jsonl"
    fake.faults = [None, None, None, None, fault]
    with pytest.raises(ValueError, match=f"The server.*{message}"):
        run(server, output, SAMPLED)
    kept = len(read_rows(output))
    assert 4 <= kept < 2 * len(TEXTS)
    assert len(fake.requests) == kept + 1, "an answer under way was lost"
    fake.requests.clear()
    assert run(server, output, SAMPLED).new_rows == len(fake.requests) == 2 * len(TEXTS) - kept
    assert output.read_bytes() == whole


def test_a_server_that_keeps_failing_raises_after_all_attempts(server, fake, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    fake.faults = [None] * 2 + [status(503, "overloaded")] * 99
    with pytest.raises(
        ConnectionError, match=r"no answer \(attempts: 3\); the last error was HTTP 503 .*overload"
    ):
        run(replace(server, tries=3), output, SAMPLED)
    fake.faults = []
    assert run(server, output, SAMPLED).new_rows == 2 * len(TEXTS) - 2
    assert output.read_bytes() == whole


def test_an_unreachable_server_raises_after_all_attempts(tmp_path):
    with serving(FakeServer()) as url:
        pass
    server = Server(url, "served", tries=2, backoff=0.0)
    with pytest.raises(
        ConnectionError, match=r"\(attempts: 2\); the last error was URLError: .*[Rr]efused"
    ):
        run(server, tmp_path / "out.jsonl")


def test_a_silent_server_times_out(server, fake, tmp_path):
    fake.delay = 0.3
    hasty = replace(server, timeout=0.05, tries=1)
    with pytest.raises(ConnectionError, match=r"\(attempts: 1\); the last error was TimeoutError"):
        run(hasty, tmp_path / "out.jsonl", prompts=PROMPTS[:1])


def test_a_killed_run_resumes_to_the_same_file(server, tmp_path, whole):
    output = tmp_path / "out.jsonl"
    run(server, output, SAMPLED)
    for offset in (0, 9, len(whole) // 2, len(whole) - 1):
        output.write_bytes(whole[:offset])
        report = run(server, output, SAMPLED)
        assert report.new_rows == 2 * len(TEXTS) - whole[:offset].count(b"\n")
        assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"server": {"model": "other"}}, "server_model was 'served' and is 'other' now"),
        ({"settings": {"max_new_tokens": 10}}, "settings.max_new_tokens was 9 and is 10 now"),
        ({"prompts": PROMPTS[1:]}, "prompts_sha256 was "),
    ],
    ids=["model", "settings", "prompts"],
)
def test_answers_of_another_run_are_refused(server, tmp_path, change, message):
    output = tmp_path / "out.jsonl"
    run(server, output)
    other = replace(server, **change.get("server", {}))
    settings = replace(SETTINGS, **change.get("settings", {}))
    with pytest.raises(ValueError, match=message):
        run(other, output, settings, change.get("prompts", PROMPTS))


def test_batch_size_and_url_may_change_between_runs(server, tmp_path):
    output = tmp_path / "out.jsonl"
    run(server, output)
    with serving(FakeServer()) as url:
        moved = Server(url, "served")
        assert run(moved, output, replace(SETTINGS, batch_size=7)).new_rows == 0


def test_the_command_line_uses_a_server(server, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    command = ["distill", "me/big", tmp_path / "out.jsonl", "--prompts", prompts]
    command += ["--server", server.url]
    result = lmtp(*command)
    assert result.exit_code == 0, result.output
    assert "6 answers" in result.stdout
    assert {request["model"] for _, request in fake.requests} == {"me/big"}
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer s3cret"}


def test_training_reads_the_answers_of_a_server(server, tmp_path):
    run(server, tmp_path / "out.jsonl")
    examples = read_examples(tmp_path / "out.jsonl", tiny_tokenizer(), end_id=2)
    assert len(examples) == len(TEXTS)
    assert all(example.input_ids[-1] == 2 for example in examples)
