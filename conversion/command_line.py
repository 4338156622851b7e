"""The command line: `lmtp COMMAND ARGUMENTS --option value`, its help, and errors in one line.

A command is a function whose parameters are annotated with dataclasses of options (see `options`). It
returns None or the exit status. Its docstring is its help, and the lines after `Examples:` come last.
"""

import difflib
import errno
import inspect
import os
import pickle
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin, get_type_hints

import jinja2
from huggingface_hub.errors import HTTPError, StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments

from modeling_lmtp import __version__

from .options import is_argument, is_required, option_groups, own_fields


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # `run` handles it; rich would exit with status 1


console = _Console(soft_wrap=True)

Command = Callable[..., int | None]
ARGUMENTS_PAGE = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
# The user's input or environment causes these; anything else is a bug, and keeps its traceback
USER_ERRORS = (
    ValueError,
    OSError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
    HTTPError,
    jinja2.TemplateError,
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    MemoryError,
)
# What shells report for a process that Ctrl-C ended, and for one whose reader has gone
INTERRUPTED, UNREAD = 130, 141


class Parser(HfArgumentParser):
    """`HfArgumentParser` that reads lists of choices, and raises errors instead of exiting."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add an option; `list[Literal[...]]`, which argparse cannot call, becomes choices of strings."""
        if get_origin(options.get("type")) is Literal:
            options |= {"choices": get_args(options["type"]), "type": str}
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError with argparse's message, naming each option once and without dashes inside."""
        message = re.sub(r"^argument (--\w+)(/--?[\w-]+)*:", r"\1:", message)
        message = re.sub(r"/--[\w-]+", "", message)
        hint = (
            " Separate several values with spaces." if re.search(r"'[^']*,[^']*'$", message) else ""
        )
        raise ValueError(f"{message}.{hint} See `{self.prog} --help`.")


def run(commands: Mapping[str, tuple[str, str]], arguments: Sequence[str]) -> int:
    """Run `lmtp` and return its exit status.

    Args:
        commands: for each name, where its function is, as `module:function`, and one line of help.
        arguments: what follows `lmtp`.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # on an ASCII terminal write escapes rather than fail
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(commands, arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            return UNREAD
        # Libraries written in Rust, such as tokenizers, raise a bare Exception
        if not isinstance(error, USER_ERRORS) and type(error) is not Exception:
            raise
        _print_error(error)
        return 1


def _run(commands: Mapping[str, tuple[str, str]], arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_commands_help(commands))
        return 0
    if name == "--version":
        print(f"modeling-lmtp {__version__}")
        return 0
    if name not in commands:
        unknown = _unknown(f"There is no command {name!r}", name, list(commands))
        raise ValueError(f"{unknown} See `lmtp --help`.")
    command = find_command(commands[name][0])
    if {"-h", "--help"} & set(rest):
        print(command_help(name, command))
        return 0
    return command(*parse(name, command, rest)) or 0


def _is_unread(stream: TextIO) -> bool:
    """Return whether the reader of a stream has gone, as `head` does; then discard what is left."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes again at exit
        return True
    return False


def find_command(place: str) -> Command:
    """Import the function at `module:function`."""
    module, _, function = place.partition(":")
    command: Command = getattr(import_module(module), function)
    return command


def option_classes(command: Command) -> list[type]:
    """Return the dataclasses that a command takes, in order."""
    hints = get_type_hints(command)
    return [hints[name] for name in inspect.signature(command).parameters]


def parse(name: str, command: Command, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Read a command's options.

    Raises:
        ValueError: an argument is missing or unknown, or a value is not allowed.
    """
    classes = option_classes(command)
    parser = Parser(classes, prog=f"lmtp {name}", allow_abbrev=False, add_help=False)
    _check_repeated(arguments)
    named = _name_arguments(name, classes[0], list(arguments))
    *options, unknown = parser.parse_args_into_dataclasses(
        named, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        names = [f"--{field.name}" for options_class in classes for field in fields(options_class)]
        word = unknown[0].partition("=")[0]
        see = f"See `lmtp {name} --help`."
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not expected there: arguments go before options. {see}")
        raise ValueError(f"{_unknown(f'There is no option {word}', word, names)} {see}")
    return tuple(options)


def _option_name(word: str) -> str:
    """Return the field's name for `--some-name`, `--some_name` or `--some_name=value`."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _check_repeated(arguments: Sequence[str]) -> None:
    """Raise a ValueError for an option that is given twice: argparse would drop the first one silently."""
    counts = Counter(_option_name(word) for word in arguments if word.startswith("--"))
    for name, count in counts.items():
        if count > 1:
            raise ValueError(
                f"--{name} is given {count} times. Give it once; if it takes several values, they follow "
                "one after the other."
            )


def _name_arguments(name: str, options: type, words: list[str]) -> list[str]:
    """Turn the positional arguments, which come before all options, into options that argparse reads."""
    hints = get_type_hints(options)
    expected = [field for field in fields(options) if is_argument(field)]
    count = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    values, rest = words[:count], words[count:]
    by_name = {_option_name(word) for word in rest}
    missing = [field for field in expected if field.name not in by_name]
    has_list = any(get_origin(hints[field.name]) is list for field in missing)
    if len(values) < len(missing) or (len(values) > len(missing) and not has_list):
        usage = " ".join(field.name.upper() for field in expected) or "no arguments"
        got = f"got {' '.join(values)}" if values else "got none"
        raise ValueError(f"lmtp {name} takes {usage}, {got}. See `lmtp {name} --help`.")
    named = []
    for place, field in enumerate(missing):
        if get_origin(hints[field.name]) is list:
            length = len(values) - (len(missing) - place - 1)
            named += [f"--{field.name}", *values[:length]]
        else:  # with =, so that argparse takes a value such as -1 for no option
            length = 1
            named.append(f"--{field.name}={values[0]}")
        values = values[length:]
    return named + rest


def _unknown(what: str, word: str, names: Sequence[str]) -> str:
    by_spelling = {name.replace("-", "_"): name for name in names}
    near = difflib.get_close_matches(word.replace("-", "_"), by_spelling, 1)
    return f"{what}; did you mean {by_spelling[near[0]]}?" if near else f"{what}."


def command_help(name: str, command: Command) -> str:
    """Return the help of a command: its own options in groups, then examples."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("Examples:\n")
    classes = option_classes(command)
    arguments = [field for field in fields(classes[0]) if is_argument(field)]
    parts = [f"usage: {_usage(name, classes)}", _wrap(text)]
    if arguments:
        parts.append(_rows([(field.name.upper(), _help(field)) for field in arguments]))
    for options in classes:
        for title, group in option_groups(options).items():
            rows = [(_option(f, options), _help(f)) for f in group if f not in arguments]
            if rows:
                parts.append(f"{title}:\n{_rows(rows)}")
        if issubclass(options, TrainingArguments):
            parts.append(
                "All options of transformers.TrainingArguments work too, such as --report_to and "
                f"--push_to_hub:\n{ARGUMENTS_PAGE}"
            )
    if examples:
        parts.append(f"examples:\n{textwrap.indent(textwrap.dedent(examples).rstrip(), '  ')}")
    return "\n\n".join(parts)


def _usage(name: str, classes: Sequence[type]) -> str:
    arguments = [field for field in fields(classes[0]) if is_argument(field)]
    required = [
        _option(field, options)
        for options in classes
        for field in own_fields(options)
        if is_required(field) and field not in arguments
    ]
    hints = get_type_hints(classes[0])
    names = [
        field.name.upper() + (" ..." if get_origin(hints[field.name]) is list else "")
        for field in arguments
    ]
    return " ".join(["lmtp", name, *names, *required, "[options]"])


def _commands_help(commands: Mapping[str, tuple[str, str]]) -> str:
    rows = [(name, line) for name, (_, line) in commands.items()]
    return (
        "usage: lmtp COMMAND ...\n\nLeap multi-token prediction for Hugging Face Transformers.\n\n"
        f"{_rows(rows)}\n\n`lmtp COMMAND --help` lists a command's options; `lmtp --version` prints the "
        "version."
    )


def _option(field: Field[Any], options: type) -> str:
    """Return an option's name and a placeholder for its value."""
    hint = get_type_hints(options)[field.name]
    if hint is bool:
        return f"--no_{field.name}" if field.default is True else f"--{field.name}"
    return f"--{field.name} {field.metadata.get('metavar') or _metavar(hint)}"


def _metavar(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return "{" + ",".join(kinds) + "}"
    if get_origin(hint) is list:
        return _metavar(kinds[0]) + " ..."
    if len(kinds) == 1 and get_origin(kinds[0]) is not None:
        return _metavar(kinds[0])
    names = {int: "N", float: "X", str: "TEXT"}
    return next((names[kind] for kind in kinds if kind in names), kinds[0].__name__.upper())


def _help(field: Field[Any]) -> str:
    text = field.metadata.get("help", "")
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is MISSING or default is None or isinstance(default, bool) or default in ("", []):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} [{shown}]"


def _width() -> int:
    """Return the terminal's width, within what is comfortable to read."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))


def _wrap(text: str) -> str:
    """Fill the paragraphs of a docstring; those with indented lines, such as lists, stay as they are."""
    paragraphs = [
        part if "\n " in part else textwrap.fill(" ".join(part.split()), _width())
        for part in text.strip().split("\n\n")
    ]
    return "\n\n".join(paragraphs)


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out names and their help in two columns."""
    width = _width()
    indent = min(max(len(name) for name, _ in rows) + 4, 34)
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - indent) or [""]
        if len(name) + 3 > indent:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name}".ljust(indent) + wrapped.pop(0))
        lines += [" " * indent + line for line in wrapped]
    return "\n".join(line.rstrip() for line in lines)


def _print_error(error: Exception) -> None:
    """Print an error in one line to stderr."""
    message = str(error) or type(error).__name__
    if isinstance(error, StrictDataclassError):  # wraps the message in the validator's name
        message = str(error.__cause__)
    elif isinstance(error, HTTPError) and not isinstance(error, OSError):  # there was no response
        message = f"The connection to the Hub failed: {error}"
    elif isinstance(error, jinja2.TemplateError):
        message = f"The chat template failed: {error}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = f"{error}. Free some space on that disk and run the command again."
    elif isinstance(error, MemoryError):
        message = "The memory of this machine does not suffice. Try a smaller batch or model."
    text = " ".join(f"error: {message}".split())
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
