"""What `use_lmtp=True` decodes plainly: the text stays, one warning says why, and `"strict"` refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from modeling_lmtp import LMTPForCausalLM, generation_lmtp


@contextmanager
def warnings_said() -> Iterator[list[str]]:
    """Collect what `generate` warns of in the block, even if it has warned of that before."""
    said: list[str] = []
    with mock.patch.object(generation_lmtp.logger, "warning_once", said.append):
        yield said


def assert_decoded_plainly(
    model: LMTPForCausalLM, match: str, options: Callable[[], dict[str, Any]] | dict[str, Any]
) -> None:
    """Check that a call with `use_lmtp=True` is plain decoding, says so, and is refused when strict.

    Args:
        model: has leap heads.
        match: a pattern of the reason.
        options: of the call, the prompt among them; a function where each call needs others.
    """
    made = options if callable(options) else lambda: dict(options)
    defaults = {"max_new_tokens": 6, "do_sample": False}
    plain = model.backbone.generate(**{**defaults, **made()})
    with warnings_said() as said:
        output = model.generate(**{**defaults, **made()}, use_lmtp=True)
    assert tokens(output).tolist() == tokens(plain).tolist()
    assert len(said) == 1
    assert said[0].startswith("use_lmtp=True decodes plainly here: ")
    assert re.search(match, said[0]), said[0]
    with pytest.raises(ValueError, match=match):
        model.generate(**{**defaults, **made()}, use_lmtp="strict")


def tokens(output: Any) -> torch.Tensor:
    return output if torch.is_tensor(output) else output.sequences
