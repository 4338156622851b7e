"""Every causal model that Transformers knows: its text is plain decoding's, or it is decoded plainly."""

from __future__ import annotations

import json

import all_causal_models
import matrix
import pytest
import transformers
from all_causal_models import MODEL_TYPES, try_all, try_model

pytestmark = pytest.mark.filterwarnings("ignore")

# One of each mechanism that `architectures` lacks
REPRESENTATIVE = {
    "axk2": ("chain", "plain"),  # an indexer selects keys
    "git": ("chain", "equal"),  # shifts the mask of a padded row
    "bart": ("chain", "equal"),  # the decoder of an encoder and a decoder
    "gemma4_text": ("tree", "equal"),
    "kimi_linear": ("chain", "equal"),
    "moshi": (
        "plain",
        "plain",
    ),  # several tokens after others get other logits than all in one pass
    "reformer": ("plain", "plain"),
}


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_representative_model_has_plain_decoding_s_text(model_type):
    if model_type not in MODEL_TYPES:
        pytest.skip(f"this release has no {model_type}")
    trial = try_model(model_type, new_tokens=60)
    assert trial.outcome in ("equal", "plain"), trial.reason
    if (
        transformers.__version__
        == json.loads(matrix.RESULTS.read_text())["versions"]["transformers"]
    ):
        assert (trial.tier, trial.outcome) == REPRESENTATIVE[model_type], trial.reason


def test_a_model_that_cannot_be_built_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setattr(all_causal_models, "MAX_PARAMETERS", 10)
    trial = try_model("llama")
    assert trial.outcome == "skipped"
    assert "parameters are left" in trial.reason


def test_a_model_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(all_causal_models, "SECONDS", 0)
    [trial] = try_all(("llama",))
    assert (trial.outcome, trial.reason) == ("skipped", "takes more than 0 seconds")


def test_no_recorded_text_is_wrong():
    trials = json.loads(matrix.RESULTS.read_text())["all_causal_models"]
    assert [trial["model_type"] for trial in trials if trial["outcome"] == "wrong"] == []
    assert all(trial["reason"] for trial in trials if trial["outcome"] == "skipped")
