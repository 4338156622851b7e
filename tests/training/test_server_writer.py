"""Prompts that a model writes through a server: what is asked, what an error says, what resumes."""

from __future__ import annotations

import json
import re
import time
from collections import Counter

import pytest
from commands import error_of, lmtp
from fake_server import FakeServer, continuation, hang_up, raw, send, serving, status
from tiny import END_OF_TURN, START_OF_TURN, tiny_tokenizer

from modeling_lmtp.conversion.prompts import read_prompts
from modeling_lmtp.training.distill import DistillSettings, manifest_path, read_rows
from modeling_lmtp.training.prompt_kinds import KINDS, prompt_kinds
from modeling_lmtp.training.self_written import self_written_prompts
from modeling_lmtp.training.server import Server
from modeling_lmtp.training.writers import ServerWriter

SETTINGS = DistillSettings(batch_size=4, magpie_temperature=0.7, magpie_max_tokens=32, seed=5)


@pytest.fixture
def fake():
    return FakeServer()


@pytest.fixture
def server(fake):
    with serving(fake) as url:
        yield Server(url, "served", backoff=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write(server, count=6, *names, settings=SETTINGS):
    writer = ServerWriter(server, tiny_tokenizer(), settings.batch_size)
    return self_written_prompts(writer, count, settings, kinds=prompt_kinds(names))


def ends(**changes):
    """Answer with a continuation that differs in these fields."""

    def fault(handler, request):
        reply = continuation(request)
        reply["choices"][0] |= changes
        send(handler, 200, reply)

    return fault


def test_a_server_continues_the_token_ids_of_a_user_turn(server, fake):
    prompts = write(server)
    asked = [request for _, request in fake.requests]
    assert {path for path, _ in fake.requests} == {"/v1/completions"}
    seeds = [request.pop("seed") for request in asked]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    header = tiny_tokenizer()(f"{START_OF_TURN}user\n", add_special_tokens=False)["input_ids"]
    for request in asked:
        assert request == {
            "model": "served",
            "prompt": header,
            "max_tokens": 32,
            "temperature": 0.7,
            "top_p": 0.95,
            "skip_special_tokens": False,
            "stop": [END_OF_TURN],
        }
    assert len(prompts) == 6
    assert {prompt.text for prompt in prompts} <= {f"Turn {seed}" for seed in seeds}


def test_prompts_do_not_depend_on_which_continuation_arrives_first(server, fake):
    def late(handler, request):
        time.sleep(0.2)
        send(handler, 200, continuation(request))

    prompts = write(server)
    fake.faults = [late, None, late]
    assert write(server) == prompts


def test_a_passage_is_written_to_the_end_of_an_answer(server, fake):
    prompts = write(server, 3, "summary")
    passages = [request for _, request in fake.requests if "stop" not in request]
    assert {request["max_tokens"] for request in passages} == {64}
    written = {(f"Passage {request['seed']}, " * 12).strip() for request in passages}
    tasks = KINDS["summary"].tasks
    possible = {task.format(passage=passage) for task in tasks for passage in written}
    assert {prompt.text for prompt in prompts} <= possible


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_limits_the_concurrent_requests(server, fake, batch_size):
    fake.delay = 0.02
    settings = DistillSettings(batch_size=batch_size)
    write(server, 4, "code", "summary", settings=settings)
    assert fake.most_under_way == batch_size


@pytest.mark.parametrize(
    "fault",
    [
        ends(finish_reason="length"),
        ends(finish_reason="content_filter"),
        ends(text=None, finish_reason="content_filter"),
        ends(text=f"a{START_OF_TURN}b"),
        ends(text=" \n"),
    ],
    ids=["cut off", "filtered", "null", "special token", "blank"],
)
def test_unusable_turns_are_replaced(server, fake, fault):
    fake.faults = [fault] * 3
    prompts = write(server)
    assert len(prompts) == 6
    assert all(prompt.text.startswith("Turn ") for prompt in prompts)


@pytest.mark.parametrize(
    "fault", [status(429), status(503), hang_up], ids=["429", "503", "hung up"]
)
def test_temporary_errors_are_retried(server, fake, fault):
    undisturbed = write(server)
    fake.faults = [None, fault, fault, None, fault]
    assert write(server) == undisturbed


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            status(404, "Not Found"),
            r"rejected a text .*HTTP 404 .*endpoint /completions with token",
        ),
        (status(422, "must be a string"), r"HTTP 422 .*must be a string.*pass --prompts"),
        (raw(b"<html>"), "must be a completion with a text and a finish_reason, got '<html>'"),
        (ends(text=3), "must be a completion"),
        (ends(finish_reason=None), "must be a completion"),
        (raw(b'{"choices": []}'), "must be a completion"),
    ],
    ids=["no endpoint", "no token ids", "no JSON", "no text", "no reason", "no choices"],
)
def test_a_server_that_cannot_continue_is_one_clear_error(
    server, fake, checkpoint, tmp_path, fault, message
):
    fake.faults = [fault] * 99
    output = tmp_path / "out.jsonl"
    error = error_of("distill", checkpoint, output, "--self_written", 2, "--server", server.url)
    assert re.search(message, error)
    assert not output.exists()


def test_an_unreachable_server_raises_after_all_attempts():
    with serving(FakeServer()) as url:
        pass
    with pytest.raises(ConnectionError, match=r"\(attempts: 2\); the last error was URLError"):
        write(Server(url, "served", tries=2, backoff=0.0))


def distill(server, checkpoint, output, *arguments):
    command = ["distill", checkpoint, output, "--server", server.url, "--batch_size", 3]
    return lmtp(*command, *arguments)


def test_one_command_writes_and_answers_prompts_of_all_kinds(server, fake, checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    result = distill(server, checkpoint, output, "--self_written", 28, "--kinds", "all")
    assert result.exit_code == 0, result.output
    assert Counter(row["kind"] for row in read_rows(output)) == dict.fromkeys(KINDS, 2)
    answered = [request["messages"] for _, request in fake.requests if "messages" in request]
    assert {message["role"] for (message,) in answered} == {"user"}
    assert sorted(message["content"] for (message,) in answered) == sorted(
        prompt.text for prompt in read_prompts(tmp_path / "out.jsonl.prompts.jsonl")
    )
    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["prompt_sources"] == {"self_written": 28, "kinds": list(KINDS)}
    assert manifest["settings"]["magpie_top_p"] == 0.95
    assert not (tmp_path / "out.jsonl.samples.jsonl").exists()
    whole, asked = output.read_bytes(), len(fake.requests)
    output.write_bytes(whole[:200])
    result = distill(server, checkpoint, output, "--self_written", 28, "--kinds", *KINDS)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == whole
    assert len(fake.requests) == asked + 28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--self_written", 4, "--kinds", "chat", "summary"],
            "made with --self_written 4 --kinds chat code.",
        ),
        (["--self_written", 4], "made with --self_written 4 --kinds chat code."),
        (
            ["--self_written", 4, "--kinds", "chat", "code", "--magpie_top_p", 0.5],
            "settings.magpie_top_p was 0.95 and is 0.5 now",
        ),
        (
            ["--self_written", 4, "--kinds", "chat", "code", "--server_model", "other"],
            "server_model was ",
        ),
    ],
    ids=["kinds", "no kinds", "settings", "model"],
)
def test_answers_to_other_prompts_are_refused(
    server, fake, checkpoint, tmp_path, arguments, message
):
    output = tmp_path / "out.jsonl"
    kinds = ["--self_written", 4, "--kinds", "code", "chat"]
    assert distill(server, checkpoint, output, *kinds).exit_code == 0
    before, asked = {p: p.read_bytes() for p in tmp_path.iterdir()}, len(fake.requests)
    result = distill(server, checkpoint, output, *arguments)
    assert result.exit_code == 1
    assert message in re.sub(r"\s+", " ", result.stderr)
    assert ({p: p.read_bytes() for p in tmp_path.iterdir()}, len(fake.requests)) == (before, asked)
