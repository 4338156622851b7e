"""The commands, as a user types them."""

from __future__ import annotations

import re
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from modeling_lmtp.__main__ import app


def lmtp(*arguments: Any) -> Result:
    """Run `lmtp` with these arguments; an error that it does not report itself is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_of(*arguments: Any) -> str:
    """Return the one error that `lmtp` prints for these arguments, its lines joined."""
    result = lmtp(*arguments)
    assert result.exit_code == 1, result.output
    assert result.output.count("error:") == 1
    return re.sub(r"\s+", " ", result.output)
