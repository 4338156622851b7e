"""The commands, as a user types them."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any, NamedTuple

from modeling_lmtp.__main__ import COMMANDS
from modeling_lmtp.conversion.command_line import run


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def lmtp(*arguments: Any) -> Result:
    """Run `lmtp` with these arguments; an error that it does not report itself is raised."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = run(COMMANDS, [str(argument) for argument in arguments])
    return Result(status, stdout.getvalue(), stderr.getvalue())


def error_of(*arguments: Any) -> str:
    """Return the one error that `lmtp` prints for these arguments, its lines joined."""
    result = lmtp(*arguments)
    assert result.exit_code == 1, result.output
    assert result.output.count("error:") == 1
    return re.sub(r"\s+", " ", result.output)
