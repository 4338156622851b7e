"""The command line: every option of a command is a field of its dataclasses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, ClassVar, Literal

import jinja2
import pytest
from commands import error_of, lmtp
from safetensors import SafetensorError
from transformers import TrainingArguments

from modeling_lmtp import __version__
from modeling_lmtp.__main__ import COMMANDS
from modeling_lmtp.conversion import command_line
from modeling_lmtp.conversion.command_line import command_help, find_command, parse, run
from modeling_lmtp.conversion.options import Options, Range, own_fields


@dataclass
class Trip(Options):
    """Where to go."""

    title: ClassVar[str] = "trip"

    start: str = field(metadata={"help": "Where from."})
    stops: list[str] = field(metadata={"help": "Where to."})
    vehicle: Literal["boat", "train"] = field(kw_only=True, metadata={"help": "By what."})
    seats: Annotated[int, Range(ge=1, le=4)] = field(default=2, metadata={"help": "How many."})
    speeds: list[Annotated[float, Range(gt=0)]] | None = field(
        default=None, metadata={"help": "How fast."}
    )
    meals: list[Literal["lunch", "dinner"]] = field(
        default_factory=lambda: ["lunch"], metadata={"help": "What is served."}
    )


@dataclass
class Tickets(Options):
    """How to pay."""

    title: ClassVar[str] = "tickets"

    max_price: float | None = field(default=None, metadata={"help": "At most."})
    reserve: bool = field(default=True, metadata={"help": "Reserve no seats."})
    log_file: Path | None = field(default=None, metadata={"help": "Where to write."})


def travel(trip: Trip, tickets: Tickets) -> int:
    """Book a trip.

    It is not paid.

    Examples:
      lmtp travel Rome Pisa --vehicle boat
    """
    return trip.seats


def read(*arguments):
    return parse("travel", travel, ["A", "B", *arguments, "--vehicle=boat"])


def test_an_option_becomes_the_field_of_its_class():
    trip, tickets = parse(
        "travel", travel,
        ["Rome", "Pisa", "Genoa", "--vehicle", "train", "--seats", "3", "--speeds", "1", "2.5",
         "--meals", "lunch", "dinner", "--no_reserve", "--log_file", "a/log"],
    )  # fmt: skip
    assert trip == Trip(
        "Rome", ["Pisa", "Genoa"], vehicle="train", seats=3, speeds=[1.0, 2.5],
        meals=["lunch", "dinner"],
    )  # fmt: skip
    assert tickets == Tickets(reserve=False, log_file=Path("a/log"))


def test_options_that_are_left_out_have_their_defaults():
    assert read() == (Trip("A", ["B"], vehicle="boat"), Tickets())


@pytest.mark.parametrize("name", ["--max_price", "--max-price"])
def test_dashes_in_a_name_are_underscores(name):
    assert read(name, "5")[1].max_price == 5.0
    assert read(f"{name}=5")[1].max_price == 5.0


def test_an_argument_may_be_given_by_name_and_begin_with_a_dash():
    trip, _ = parse("travel", travel, ["-1", "B", "C", "--vehicle", "boat"])
    assert (trip.start, trip.stops) == ("-1", ["B", "C"])
    trip, _ = parse("travel", travel, ["B", "C", "--start", "A", "--vehicle", "boat"])
    assert (trip.start, trip.stops) == ("A", ["B", "C"])


REFUSED = {
    "no argument": ([], "lmtp travel takes START STOPS, got none. See `lmtp travel --help`."),
    "an argument is missing": (["A"], "takes START STOPS, got A."),
    "a required option is missing": (["A", "B"], "required: --vehicle. See `lmtp travel --help`."),
    "an argument after an option": (
        ["A", "B", "--vehicle=boat", "--seats", "2", "C"],
        "'C' is not expected there: arguments go before options.",
    ),
    "an unknown option": (
        ["A", "B", "--vehicle=boat", "--seat", "1"],
        "no option --seat; did you mean --seats?",
    ),
    "an option like none": (
        ["A", "B", "--vehicle=boat", "--xyz=1"],
        "There is no option --xyz. See",
    ),
    "part of an option's name": (
        ["A", "B", "--vehicle=boat", "--veh", "boat"],
        "There is no option --veh",
    ),
    "an option twice": (
        ["A", "B", "--meals", "lunch", "--meals", "dinner"],
        "--meals is given 2 times. Give it once;",
    ),
    "no number": (["A", "B", "--seats", "two"], "--seats: invalid int value: 'two'. See"),
    "no value": (["A", "B", "--seats"], "--seats: expected one argument. See"),
    "commas": (
        ["A", "B", "--speeds", "1,2"],
        "--speeds: invalid float value: '1,2'. Separate several values with spaces.",
    ),
    "another choice": (["A", "B", "--vehicle", "bus"], "--vehicle: invalid choice: 'bus'"),
    "another choice in a list": (["A", "B", "--meals", "tea"], "--meals: invalid choice: 'tea'"),
    "out of bounds": (
        ["A", "B", "--vehicle", "boat", "--seats", "9"],
        "seats must be at least 1 and at most 4, got 9.",
    ),
    "out of bounds in a list": (
        ["A", "B", "--vehicle", "boat", "--speeds", "1", "0"],
        "speeds must be more than 0, got 0.0.",
    ),
}


@pytest.fixture
def lmtp_travel(monkeypatch):
    """Run `lmtp travel` with these arguments, and return its exit status."""
    monkeypatch.setattr(command_line, "find_command", {"here:travel": travel}.get)
    return lambda *arguments: run({"travel": ("here:travel", "Travel.")}, ["travel", *arguments])


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_said_in_one_line(lmtp_travel, capsys, arguments, message):
    assert lmtp_travel(*arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_the_status_is_what_the_command_returns(lmtp_travel):
    assert lmtp_travel("A", "B", "--vehicle", "boat", "--seats", "3") == 3


@pytest.fixture
def lmtp_fail(monkeypatch):
    """Run a command that raises this error, and return its exit status."""

    def run_failing(error):
        def fail(trip: Trip) -> None:
            """Fail."""
            raise error

        monkeypatch.setattr(command_line, "find_command", lambda place: fail)
        return run({"fail": ("here:fail", "Fail.")}, ["fail", "A", "B", "--vehicle", "boat"])

    return run_failing


OF_THE_USER = [
    *(ValueError, OSError, RuntimeError, ImportError, EOFError, SafetensorError, UnpicklingError),
    Exception,  # what tokenizers raises
]


@pytest.mark.parametrize("error", OF_THE_USER)
def test_errors_of_the_user_have_no_traceback(lmtp_fail, capsys, error):
    assert lmtp_fail(error("It is late,\n\n  and [dark].")) == 1
    assert capsys.readouterr().err == "error: It is late, and [dark].\n"


def test_bugs_have_a_traceback(lmtp_fail):
    with pytest.raises(TypeError, match="a bug"):
        lmtp_fail(TypeError("a bug"))


EXPLAINED = {
    "no message": (EOFError(), "EOFError"),
    "full disk": (
        OSError(28, "No space left on device", "out"),
        "[Errno 28] No space left on device: 'out'. Free some space on that disk and run the command "
        "again.",
    ),
    "memory": (
        MemoryError(),
        "The memory of this machine does not suffice. Try a smaller batch or model.",
    ),
    "template": (jinja2.UndefinedError("no role"), "The chat template failed: no role"),
}


@pytest.mark.parametrize(("error", "message"), EXPLAINED.values(), ids=EXPLAINED)
def test_an_error_says_what_it_means(lmtp_fail, capsys, error, message):
    assert lmtp_fail(error) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("printing", ["print('text')", "command_line.console.print('text')"])
def test_a_reader_that_has_gone_ends_a_command_in_silence(printing):
    script = f"""
import sys
from modeling_lmtp.conversion import command_line
command_line._run = lambda *_: [{printing} for _ in range(9999)] and 0
sys.exit(command_line.run({{}}, []))
"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupted_command_has_the_status_of_shells(monkeypatch, capsys):
    def wait(trip: Trip) -> None:
        """Wait."""
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "find_command", lambda place: wait)
    assert run({"wait": ("", "")}, ["wait", "A", "B", "--vehicle", "boat"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_lists_arguments_and_the_options_of_each_class(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert (
        command_help("travel", travel)
        == """\
usage: lmtp travel START STOPS ... --vehicle {boat,train} [options]

Book a trip.

It is not paid.

  START  Where from.
  STOPS  Where to.

trip:
  --vehicle {boat,train}      By what.
  --seats N                   How many. [2]
  --speeds X ...              How fast.
  --meals {lunch,dinner} ...  What is served. [lunch]

tickets:
  --max_price X    At most.
  --no_reserve     Reserve no seats.
  --log_file PATH  Where to write.

examples:
  lmtp travel Rome Pisa --vehicle boat"""
    )


@pytest.mark.parametrize("arguments", [["--help"], ["A", "-h"]], ids=str)
def test_help_is_printed_instead_of_running(lmtp_travel, capsys, arguments):
    assert lmtp_travel(*arguments) == 0
    assert capsys.readouterr().out.startswith("usage: lmtp travel")


@dataclass
class Training(Options, TrainingArguments):
    """Options beside those of Transformers."""

    pace: Annotated[float, Range(gt=0)] = field(default=1.0, metadata={"help": "How fast."})


def practise(training: Training) -> None:
    """Train."""


def test_training_arguments_are_taken_but_not_listed():
    assert [option.name for option in own_fields(Training)] == ["pace"]
    text = command_help("practise", practise)
    assert "--pace X" in text
    assert "--save_steps" not in text
    assert "All options of transformers.TrainingArguments work too" in text
    [training] = parse("practise", practise, ["--save-steps", "7", "--report_to", "none"])
    assert training.save_steps == 7


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Range(ge=0), "at least 0", [0, 0.5], [-1, float("nan")]),
        (Range(gt=0), "more than 0", [1e-9], [0]),
        (Range(ge=0, le=1), "at least 0 and at most 1", [0, 1], [1.1]),
        (Range(lt=1.5), "less than 1.5", [1], [1.5]),
    ],
    ids=str,
)
def test_bounds(bounds, text, inside, outside):
    assert str(bounds) == text
    assert all(bounds.allows(value) for value in inside)
    assert not any(bounds.allows(value) for value in outside)


def test_options_are_checked_in_python_too():
    with pytest.raises(ValueError, match=r"vehicle must be one of boat, train; got 'bus'"):
        Trip("A", [], vehicle="bus")
    with pytest.raises(ValueError, match=r"meals must be one of lunch, dinner; got 'tea'"):
        Trip("A", [], vehicle="boat", meals=["lunch", "tea"])


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_on_one_screen(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    command = find_command(COMMANDS[name][0])
    text = command_help(name, command)
    lines = text.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert f"examples:\n  lmtp {name}" in text
    for options in command_line.option_classes(command):
        assert all(option.metadata.get("help") for option in own_fields(options))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_each_command_are_understood(name):
    command = find_command(COMMANDS[name][0])
    _, _, examples = command_help(name, command).partition("examples:\n")
    for line in examples.splitlines():
        words = line.strip().split("   ")[0].replace('"', "'").split("'")
        arguments = [
            word
            for place, part in enumerate(words)
            for word in ([part] if place % 2 else part.split())
        ]
        if arguments[:1] == ["lmtp"]:
            parse(name, command, arguments[2:])


def test_the_list_of_commands_and_the_version(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    for arguments in ([], ["--help"], ["-h"]):
        result = lmtp(*arguments)
        assert result.exit_code == 0
        assert all(line in result.stdout for _, line in COMMANDS.values())
    assert lmtp("--version").stdout == f"modeling-lmtp {__version__}\n"


def test_an_unknown_command_is_refused():
    message = "There is no command 'benhc'; did you mean bench? See `lmtp --help`."
    assert message in error_of("benhc")


def test_an_error_is_one_line_on_a_terminal_that_knows_ascii_only():
    text = "größe 見"
    done = subprocess.run(
        [sys.executable, "-m", "modeling_lmtp", text],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    escaped = text.encode("ascii", "backslashreplace").decode()
    message = f"error: There is no command '{escaped}'. See `lmtp --help`."
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode("ascii").splitlines() == [message]
