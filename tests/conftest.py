"""What every test needs: releases of Transformers that are wrong themselves, and names about to go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from weakref import WeakSet

import pytest
import transformers
from pass_count import PassCount

from modeling_lmtp import LMTPForCausalLM, generation_lmtp
from modeling_lmtp.planner_lmtp import DraftPlanner
from modeling_lmtp.static_lmtp import StaticVerifier
from modeling_lmtp.verification_lmtp import Verifier

RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])

# Below a release, tests with a word in their name, and why
WRONG_BELOW = [
    ((5, 20), "roformer", "plain decoding with a cache differs from a pass over the whole text"),
    ((5, 20), "llama4_text", "Transformers cannot make masks of chunks for padded batches"),
    (
        (5, 20),
        "records_its_base[whole",
        "AutoModelForCausalLM loads no adapter that keeps whole modules",
    ),
    ((5, 20), "two_processes_train", "the Trainer cannot go on in several processes on a CPU"),
]


# What calls are told that pass settings in two ways, as tests do on purpose
CALLERS_OWN = "Passing `generation_config` together with generation-related arguments"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this release gets wrong without L-MTP; begin with the files that take longest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, "smollm2" not in item.path.name))
    for item in items:
        for release, word, reason in WRONG_BELOW:
            if release > RELEASE and word in item.name and "AutoPeft" not in item.name:
                item.add_marker(pytest.mark.skip(reason=f"{transformers.__version__}: {reason}"))


class _Deprecations(logging.Handler):
    """Collects what Transformers logs of its own names that are about to go."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a deprecation."""
        message = record.getMessage()
        is_of_transformers = "deprecated" in message and record.name.startswith("transformers.")
        if is_of_transformers and not message.startswith(CALLERS_OWN):
            self.said.append(message)


@pytest.fixture(autouse=True)
def no_name_that_is_about_to_go() -> Iterator[None]:
    """Fail a test in which Transformers logs a deprecation; those that are warnings are errors anyway."""
    handler = _Deprecations()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.said == []


@pytest.fixture(autouse=True)
def passes_are_the_clock_of_planned_drafts(monkeypatch: pytest.MonkeyPatch) -> PassCount:
    """Let a pass take a second, whatever its size, so that drafts are planned alike on every machine."""
    clock = PassCount()
    for verifier in (Verifier, StaticVerifier):
        monkeypatch.setattr(verifier, "verify", clock.counting(verifier.verify))
    monkeypatch.setattr(generation_lmtp, "DraftPlanner", lambda: DraftPlanner(clock))
    met = WeakSet[LMTPForCausalLM]()
    planner_of = LMTPForCausalLM.draft_planner.fget

    def planner_of_this_test(model: LMTPForCausalLM) -> DraftPlanner:
        """A model that tests share brings nothing from another one, neither rates nor its clock."""
        if model not in met:
            met.add(model)
            model._draft_planner = None
        return planner_of(model)

    monkeypatch.setattr(LMTPForCausalLM, "draft_planner", property(planner_of_this_test))
    return clock
