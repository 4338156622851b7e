"""Self-written prompts of several kinds: spread evenly, each written as its kind says, resumed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from accelerate import PartialState, debug_launcher
from tiny import END_OF_TURN, START_OF_TURN, tiny_tokenizer

from modeling_lmtp.conversion.batch_generation import derived_seed
from modeling_lmtp.training.distill_settings import DistillSettings
from modeling_lmtp.training.processes import process_state
from modeling_lmtp.training.prompt_kinds import (
    ALL,
    KINDS,
    PASSAGE_SYSTEMS,
    SELF_WRITTEN,
    prompt_kinds,
)
from modeling_lmtp.training.self_written import SampleLog, self_written_prompts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:OMP_NUM_THREADS:UserWarning"),
]

SETTINGS = DistillSettings(batch_size=4, magpie_max_tokens=32)
USER, ASSISTANT = f"{START_OF_TURN}user\n", f"{START_OF_TURN}assistant\n"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ '[' + m['content'] + ']' }}{% endfor %}{{ '>' }}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}{% endfor %}"
)


class ScriptedWriter:
    """Writes `turn(seed, row)` or `passage(seed, row)`, and keeps what it was asked to continue."""

    def __init__(self, tokenizer=None, passage=None):
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.passage = passage or (lambda seed, row: f"{seed} {row} {{x}} and so on, " * 9)
        self.asked = []

    def write(self, batches):
        for batch in batches:
            self.asked.append(batch)
            seed, rows = batch.sampling.seed % 10**6, range(len(batch.prompts))
            if batch.turn_end:
                yield [f"Turn {seed} {row}" for row in rows]
            else:
                yield [self.passage(seed, row) for row in rows]

    @property
    def beginnings(self):
        """What it continued, as text, and whether a user turn was to be written."""
        return {
            (self.tokenizer.decode(ids), batch.turn_end is not None)
            for batch in self.asked
            for ids in batch.prompts
        }


def write(count, *names, writer=None, settings=SETTINGS, log=None):
    writer = writer or ScriptedWriter()
    return self_written_prompts(writer, count, settings, kinds=prompt_kinds(names), log=log)


def system(text):
    return f"{START_OF_TURN}system\n{text}{END_OF_TURN}\n"


@pytest.mark.parametrize("count", [2, 3, 15, 31])
def test_prompts_are_spread_evenly_over_the_kinds(count):
    prompts = write(count, ALL)
    kinds = Counter(prompt.kind for prompt in prompts)
    assert len(prompts) == len({prompt.text for prompt in prompts}) == count
    assert max(kinds.values()) - min(kinds[name] for name in KINDS) <= 1


def test_kinds_are_written_in_one_order_however_they_are_named():
    assert write(4, "summary", "code") == write(4, "code", "summary", "code")
    assert [prompt.kind for prompt in write(4, "summary", "code")] == ["code"] * 2 + ["summary"] * 2


@pytest.mark.parametrize("name", [name for name in KINDS if not KINDS[name].tasks])
def test_a_kind_without_tasks_writes_user_turns_under_its_system_message(name):
    writer = ScriptedWriter()
    prompts = write(3, name, writer=writer)
    message = KINDS[name].system
    assert writer.beginnings == {(f"{system(message) if message else ''}{USER}", True)}
    assert {prompt.text[:5] for prompt in prompts} == {"Turn "}


def test_prompts_without_kinds_are_written_as_ever(tmp_path):
    writer, log = ScriptedWriter(), SampleLog(tmp_path / "log.jsonl", {}, SETTINGS)
    prompts = write(6, writer=writer, log=log)
    assert {prompt.kind for prompt in prompts} == {"self-written"}
    assert writer.beginnings == {(USER, True)}
    seeds = [batch.sampling.seed for batch in writer.asked]
    assert seeds == [derived_seed(0, "self-written", number) for number in (0, 1)]
    rows = [json.loads(line) for line in log.path.read_text().splitlines()[1:]]
    assert [list(row) for row in rows] == [["texts"], ["texts"]]


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].tasks])
def test_a_kind_with_tasks_asks_about_passages_that_the_model_wrote(name):
    writer = ScriptedWriter()
    prompts = write(12, name, writer=writer)
    written = {
        writer.passage(batch.sampling.seed % 10**6, row).strip()
        for batch in writer.asked
        for row in range(4)
        if not batch.turn_end
    }
    possible = {
        task.format(passage=passage): task for task in KINDS[name].tasks for passage in written
    }
    used = {possible[prompt.text] for prompt in prompts}
    assert len(used) > 1
    turns = {text for text, is_turn in writer.beginnings if is_turn}
    assert turns == {f"{system(message)}{USER}" for message in PASSAGE_SYSTEMS}
    for text, is_turn in writer.beginnings:
        if not is_turn:
            assert any(text.startswith(f"{turn}Turn ") for turn in turns)
            assert text.endswith(f"{END_OF_TURN}\n{ASSISTANT}")


def test_passages_may_be_twice_as_long_as_prompts_and_have_their_own_seeds():
    writer = ScriptedWriter()
    write(4, "summary", writer=writer)
    limits = {(bool(batch.turn_end), batch.sampling.max_new_tokens) for batch in writer.asked}
    assert limits == {(True, 32), (False, 64)}
    seeds = [batch.sampling.seed for batch in writer.asked]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    "bad", [None, "", "too short", f"a{START_OF_TURN}" * 99], ids=["cut", "empty", "short", "token"]
)
def test_unusable_passages_are_dropped_and_replaced(bad):
    def passage(seed, row):
        return bad if row % 2 else f"{seed} {row} is long, " * 12

    prompts = write(6, "key_points", writer=ScriptedWriter(passage=passage))
    assert len(prompts) == 6
    assert all("is long" in prompt.text for prompt in prompts)


def test_a_kind_that_the_model_cannot_write_warns_and_leaves_the_others(recwarn):
    writer = ScriptedWriter(passage=lambda seed, row: None)
    prompts = write(6, "code", "summary", writer=writer)
    assert [prompt.kind for prompt in prompts] == ["code"] * 3
    (warning,) = [str(w.message) for w in recwarn if "prompts of the kind" in str(w.message)]
    assert "wrote only 0 of 3 prompts of the kind 'summary' in 30 samples" in warning


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refuses", "drops"])
def test_a_template_without_system_messages_names_the_kind_that_needs_one(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    for name in ("writing", "summary"):
        with pytest.raises(ValueError, match=f"takes no system message.* kind '{name}'"):
            write(2, "chat", name, writer=ScriptedWriter(tokenizer))
    assert len(write(2, "chat", writer=ScriptedWriter(tokenizer))) == 2


def test_a_stopped_run_resumes_to_the_same_prompts_of_each_kind(tmp_path):
    kinds = ("code", "chat", "summary")
    path = tmp_path / "log.jsonl"
    prompts = write(15, *kinds, log=SampleLog(path, {}, SETTINGS))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 1 + 6
    for offset in (ends[1], ends[3] + 5, ends[5], ends[-1]):
        path.write_bytes(whole[:offset])
        writer = ScriptedWriter()
        assert write(15, *kinds, writer=writer, log=SampleLog(path, {}, SETTINGS)) == prompts
        assert path.read_bytes() == whole
        assert bool(writer.asked) == (offset != ends[-1])


def test_kinds_do_not_depend_on_the_number_of_processes(tmp_path):
    def work():
        PartialState._reset_state()
        log = SampleLog(tmp_path / "log.jsonl", {}, SETTINGS)
        texts = [[prompt.kind, prompt.text] for prompt in write(15, "code", "summary", log=log)]
        (tmp_path / f"{process_state().process_index}").write_text(json.dumps(texts))

    debug_launcher(work, num_processes=2)
    expected = [[prompt.kind, prompt.text] for prompt in write(15, "code", "summary")]
    assert [json.loads((tmp_path / name).read_text()) for name in "01"] == [expected] * 2


def test_another_seed_gives_other_prompts_of_every_kind():
    texts = [
        {p.text for p in write(28, ALL, settings=replace(SETTINGS, seed=seed))} for seed in (0, 1)
    ]
    assert not texts[0] & texts[1]


def test_every_task_holds_one_passage_and_every_system_message_is_its_own():
    for kind in KINDS.values():
        assert all(task.count("{passage}") == 1 for task in kind.tasks)
        assert kind.system is None or not kind.tasks
    systems = [kind.system for kind in KINDS.values() if kind.system]
    assert len(set(systems)) == len(systems)


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ValueError, match=r"kinds must be all, or some of chat, .*; got poem, prose"
    ):
        prompt_kinds(["prose", "chat", "poem"])
    assert prompt_kinds([]) == [SELF_WRITTEN]
