"""The command line: `lmtp COMMAND ARGUMENTS --option value`, its help, and errors in one line.

A command is a function whose parameters are annotated with dataclasses of options (see `options`); it
returns None, or the exit status. Its docstring is its help; what follows a line `Examples:` comes last.
"""

import difflib
import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from importlib import import_module
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import jinja2
from huggingface_hub.errors import HTTPError, StrictDataclassError
from rich.console import Console
from transformers import HfArgumentParser, TrainingArguments

from .options import is_argument, own_fields

console = Console(soft_wrap=True)

Command = Callable[..., int | None]
ARGUMENTS_PAGE = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
# What bad input and a bad environment cause; others are mistakes of this package
USER_ERRORS = (
    ValueError,
    OSError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
    HTTPError,
    jinja2.TemplateError,
)


class Parser(HfArgumentParser):
    """`HfArgumentParser` that raises its errors instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError with argparse's message."""
        raise ValueError(message)


def run(commands: Mapping[str, tuple[str, str]], arguments: Sequence[str]) -> int:
    """Run `lmtp` and return its exit status.

    Args:
        commands: for each name, where the function is, as `module:function`, and one line of help.
        arguments: what follows `lmtp`.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_commands_help(commands))
        return 0
    try:
        if name not in commands:
            raise ValueError(_unknown(f"There is no command {name!r}", name, list(commands)))
        module, _, function = commands[name][0].partition(":")
        command = getattr(import_module(module), function)
        if {"-h", "--help"} & set(rest):
            print(command_help(name, command))
            return 0
        return command(*parse(name, command, rest)) or 0
    except KeyboardInterrupt:
        return 130  # as a shell reports it
    except USER_ERRORS as error:
        _print_error(error)
        return 1


def option_classes(command: Command) -> list[type]:
    """Return the dataclasses that a command takes, in order."""
    hints = get_type_hints(command)
    return [hints[name] for name in inspect.signature(command).parameters]


def parse(name: str, command: Command, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Read a command's options.

    Raises:
        ValueError: they are not the command's, or a value is not allowed.
    """
    classes = option_classes(command)
    parser = Parser(classes, prog=f"lmtp {name}", allow_abbrev=False, add_help=False)
    named = _with_names(name, classes[0], list(arguments))
    *options, unknown = parser.parse_args_into_dataclasses(
        named, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        names = [f"--{field.name}" for options_class in classes for field in fields(options_class)]
        word = unknown[0].partition("=")[0]
        see = f"See `lmtp {name} --help`."
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not expected there: arguments go before options. {see}")
        raise ValueError(f"{_unknown(f'{word} is not an option', word, names)} {see}")
    return tuple(options)


def _with_names(name: str, options: type, arguments: list[str]) -> list[str]:
    """Put the names of the command's arguments before the words that the command line begins with."""
    expected = [field for field in fields(options) if is_argument(field)]
    count = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    words, rest = arguments[:count], arguments[count:]
    given_by_name = {word.partition("=")[0].replace("-", "_") for word in rest}
    missing = [field for field in expected if f"__{field.name}" not in given_by_name]
    takes_all = any(get_origin(field.type) is list for field in missing)
    if len(words) < len(missing) or (len(words) > len(missing) and not takes_all):
        usage = " ".join(field.name.upper() for field in expected) or "no arguments"
        got = f"got {' '.join(words)}" if words else "got none"
        raise ValueError(f"lmtp {name} takes {usage}, {got}. See `lmtp {name} --help`.")
    named = []
    for number, field in enumerate(missing):
        later = len(missing) - number - 1
        taken = len(words) - later if get_origin(field.type) is list else 1
        named += [f"--{field.name}", *words[:taken]]
        words = words[taken:]
    return named + rest


def _unknown(what: str, word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(
        word.replace("-", "_"), [n.replace("-", "_") for n in names], 1
    )
    return f"{what}; did you mean {near[0].replace('__', '--', 1)}?" if near else f"{what}."


def command_help(name: str, command: Command) -> str:
    """Return the help of a command: its own options in groups, then examples."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("Examples:\n")
    classes = option_classes(command)
    arguments = [field for field in fields(classes[0]) if is_argument(field)]
    usage = " ".join(["lmtp", name, *(field.name.upper() for field in arguments), "[options]"])
    parts = [f"usage: {usage}", text.strip()]
    if arguments:
        parts.append(_rows([(field.name.upper(), _help(field)) for field in arguments]))
    for options in classes:
        rows = [
            (_option(field, options), _help(field))
            for field in own_fields(options)
            if not is_argument(field)
        ]
        if rows:
            parts.append(f"{options.title}:\n{_rows(rows)}")
        if issubclass(options, TrainingArguments):
            parts.append(
                "All options of transformers.TrainingArguments are taken as well, such as --report_to "
                f"and --push_to_hub:\n{ARGUMENTS_PAGE}"
            )
    if examples:
        parts.append(f"examples:\n{textwrap.indent(textwrap.dedent(examples).rstrip(), '  ')}")
    return "\n\n".join(parts)


def _commands_help(commands: Mapping[str, tuple[str, str]]) -> str:
    rows = [(name, line) for name, (_, line) in commands.items()]
    return (
        "usage: lmtp COMMAND ...\n\nLeap multi-token prediction for Hugging Face Transformers.\n\n"
        f"{_rows(rows)}\n\n`lmtp COMMAND --help` lists a command's options."
    )


def _option(field: Field[Any], options: type) -> str:
    """Return an option's name and what it takes."""
    hint = get_type_hints(options)[field.name]
    if hint is bool:
        return f"--no_{field.name}" if field.default is True else f"--{field.name}"
    return f"--{field.name} {field.metadata.get('metavar') or _metavar(hint)}"


def _metavar(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return "{" + ",".join(kinds) + "}"
    if len(kinds) == 1 and get_origin(kinds[0]) is not None:
        return _metavar(kinds[0]) + (" ..." if get_origin(kinds[0]) is list else "")
    names = {int: "N", float: "X", str: "TEXT"}
    return next((names[kind] for kind in kinds if kind in names), kinds[0].__name__.upper())


def _help(field: Field[Any]) -> str:
    text = field.metadata.get("help", "")
    is_shown = not is_argument(field) and field.default not in (None, False, True, "")
    return f"{text} (default: {field.default})" if is_shown else text


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out names beside their help, as wide as the terminal, at most 110 columns."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
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
    message: object = error
    if isinstance(error, StrictDataclassError):  # the validator's name around the message
        message = error.__cause__
    elif isinstance(error, HTTPError) and not isinstance(error, OSError):  # no answer came at all
        message = f"The connection to the Hub failed: {error}"
    elif isinstance(error, jinja2.TemplateError):
        message = f"The chat template failed: {error}"
    text = f"error: {message}"
    encoding = getattr(sys.stderr, "encoding", None) or "ascii"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
