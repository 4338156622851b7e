"""What the commands of `lmtp` share: the app, its console, errors in one line, common options."""

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from huggingface_hub.errors import HTTPError, StrictDataclassError
from rich.console import Console

app = typer.Typer(
    help="Leap multi-token prediction for Hugging Face Transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
BadRows = Annotated[
    str, typer.Option(help="refuse answers with a bad row, or skip such rows and count them.")
]
Offsets = Annotated[
    str | None, typer.Option(help="Comma-separated leap offsets, such as 2,3,5, instead of both.")
]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors that the user can mend as one line, without a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError, but no error to print
            raise
        except (ValueError, OSError, RuntimeError, StrictDataclassError, HTTPError) as error:
            message = f"error: {_shown(error)}"
            Console(stderr=True).print(message, style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return wrapped


def _shown(error: Exception) -> str:
    if isinstance(
        error, StrictDataclassError
    ):  # wraps a configuration's own in its validator's name
        return str(error.__cause__)
    if isinstance(error, HTTPError) and not isinstance(error, OSError):  # no answer came at all
        return f"The connection to the Hub failed: {error}"
    return str(error)


def parse_head_context(text: str) -> int | str:
    """Read `--head-context`."""
    if text == "path":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--head-context takes a whole number, or path; got {text!r}.") from error


def parse_offsets(text: str | None) -> tuple[int, ...] | None:
    """Read `--leap-offsets`."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--leap-offsets takes whole numbers with commas between, such as 2,3,5; got {text!r}."
        ) from error
