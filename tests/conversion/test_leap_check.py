"""Heads with a wrong offset decode without a mistake and are never accepted: the check finds them."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.converting import CheckOptions, ConvertOptions, convert_heads
from modeling_lmtp.conversion.exporting import ExportOptions, export_checkpoint
from modeling_lmtp.conversion.leap_check import LeapFit, fit_leaps, generated_texts
from modeling_lmtp.training.examples import AnswerDataset, Example, collate


def fit(offsets, accuracies, count=400):
    """Return accuracies over `count` positions, drawn independently with these probabilities."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor(accuracies)
    drawn = torch.rand(*shares.shape, count, generator=generator)
    return LeapFit(offsets, (drawn < shares[..., None]).double().mean(dim=2), count)


def test_hits_are_counted_at_the_offset_from_each_state():
    model = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2, 4))
    generator = torch.Generator().manual_seed(8)
    for parameter in model.leap_heads.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    ids = torch.randint(3, 320, (1, 30), generator=generator)
    with torch.no_grad():
        predicted = [p.argmax(-1)[0] for p in model(ids, output_leap_logits=True).leap_logits]
    ids[0, 12:] = predicted[1][8 : 8 + 18]  # what head 1 says of 4 ahead; states change with it
    found = fit_leaps(model, [Example(ids[0].tolist(), 5)])
    with torch.no_grad():
        predicted = [p.argmax(-1)[0] for p in model(ids, output_leap_logits=True).leap_logits]
    assert (found.accuracies.shape, found.num_positions) == ((2, 7), 30 - 7 - 5)
    for head in range(2):
        for offset in range(1, 8):
            expected = sum(int(predicted[head][s] == ids[0, s + offset]) for s in range(5, 23))
            assert found.accuracies[head, offset - 1] == pytest.approx(expected / 18)
    assert found.accuracies[1].argmax() == 3


def test_right_offsets_pass():
    found = fit((2, 3), [[0.1, 0.4, 0.1, 0.1, 0.1], [0.05, 0.1, 0.25, 0.05, 0.05]])
    assert (found.wrong, found.unclear, found.check()) == ((), (), None)


def test_wrong_offsets_are_named_with_those_that_fit():
    found = fit((3, 5), [[0.1, 0.4, 0.1, 0.1, 0.1], [0.05, 0.1, 0.25, 0.05, 0.05]])
    with pytest.raises(
        ValueError, match=r"head 0: \d+\.\d% at 3, \d+\.\d% at 2;.*--leap_offsets 2 3 "
    ):
        found.check()


@pytest.mark.parametrize(
    "accuracies",
    [[0.0] * 5, [0.05] * 5, [0.9] * 5, [0.8, 0.1, 0.1, 0.1, 0.1]],
    ids=["never right", "as often everywhere", "a text of one token", "the next token, untrained"],
)
def test_where_nothing_stands_out_it_says_so(accuracies):
    found = fit((2,), [accuracies])
    assert found.wrong == ()
    assert "offset of head 0 could not be confirmed" in found.check()


def test_weak_heads_that_smear_are_not_called_wrong():
    found = fit((2, 7), [[0.1, 0.4, *[0.1] * 6], [0.06, 0.07, 0.08, 0.07, 0.08, 0.09, 0.08, 0.09]])
    assert found.wrong == ()


@pytest.mark.parametrize("count", [100, 400, 700])
def test_a_wrong_leap_of_weak_heads_is_found_and_the_right_one_is_not(count):
    accuracies = [[0.05, 0.06, 0.35, 0.08, 0.06], [0.04, 0.04, 0.05, 0.05, 0.2]]
    assert fit((3, 5), accuracies, count).wrong == ()
    assert fit((2, 4), accuracies, count).wrong == (0, 1)


def test_a_few_tokens_prove_nothing():
    assert fit((3,), [[0.1, 0.4, 0.1, 0.1]], count=12).wrong == ()


def test_texts_that_are_too_short_are_refused():
    model = LMTPForCausalLM.from_backbone(tiny_llama(), leap_offsets=(2,))
    with pytest.raises(ValueError, match=r"shorter than 6 tokens.*--no_check_leap"):
        fit_leaps(model, [Example([5, 6, 7, 8, 9, 10], 2)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a backbone, and Medusa heads that learned its own text at the offsets 2, 3."""
    folder = tmp_path_factory.mktemp("trained")
    backbone, tokenizer = tiny_llama(eos_token_id=None), tiny_tokenizer()
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    model = LMTPForCausalLM.from_backbone(
        str(folder / "backbone"), leap_offsets=(2, 3), share_lm_head=False
    )
    texts = AnswerDataset(generated_texts(backbone, tokenizer))
    batch = collate([texts[index] for index in range(len(texts))])
    optimizer = torch.optim.Adam(model.leap_heads.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    export_checkpoint(ExportOptions(str(folder / "checkpoint"), folder / "medusa", to="medusa"))
    return folder


def test_trained_heads_are_confirmed(trained, tmp_path):
    options = ConvertOptions(str(trained / "medusa"), tmp_path / "out")
    report = convert_heads(options, CheckOptions())
    assert (report.leap_offsets, report.notes) == ((2, 3), ())


@pytest.mark.parametrize("options", [{"leap_stride": 2}, {"leap_offsets": [2, 4]}], ids=str)
def test_a_wrong_leap_is_refused_and_may_be_insisted_on(trained, tmp_path, options):
    converted = ConvertOptions(str(trained / "medusa"), tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"do not fit these heads.*--leap_offsets 2 3 "):
        convert_heads(converted, CheckOptions())
    assert not any(tmp_path.iterdir())
    report = convert_heads(converted, CheckOptions(check_leap=False))
    assert report.leap_offsets == tuple(options.get("leap_offsets", (3, 5)))
