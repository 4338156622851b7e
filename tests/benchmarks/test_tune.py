"""`lmtp tune`: the choice against an exhaustive one, with costs made up, and what `generate` obeys."""

import itertools
import json

import pytest
import torch
from bench_runs import PROMPTS, tiny_model, write_checkpoint
from commands import error_of, lmtp
from tiny import tiny_tokenizer
from transformers import GenerationConfig
from transformers.utils import logging

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks import tune_run
from modeling_lmtp.benchmarks.simulation import simulate
from modeling_lmtp.benchmarks.step_times import step_seconds
from modeling_lmtp.benchmarks.tune_run import Trial, Verdict, set_drafts
from modeling_lmtp.benchmarks.tuning import (
    NOTHING,
    TunedDraft,
    _Costs,
    best_drafts,
    candidate_trees,
    choose_drafts,
    of_tree,
    steps_together,
)
from modeling_lmtp.conversion.saving import file_sha256
from modeling_lmtp.settings_lmtp import LMTPSettings
from modeling_lmtp.support_lmtp import Tier
from modeling_lmtp.training.evaluation import answer_states, evaluate_heads, tokens_per_step
from modeling_lmtp.training.examples import Example, split_examples
from modeling_lmtp.tree_lmtp import DraftTree

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
ACCURACIES = {
    "steady": [[0.7, 0.2], [0.6, 0.2], [0.5, 0.2]],
    "falling": [[0.5, 0.3], [0.2, 0.15], [0.1, 0.1]],
    "useless": [[0.02, 0.01], [0.01, 0.01], [0.01, 0.01]],
}
COSTS = {
    "flat": lambda tree: 1 + 0.01 * tree.num_nodes,
    "steep": lambda tree: 1 + 0.25 * tree.num_nodes,
    "a pass per level": lambda tree: 1 + 0.02 * tree.num_nodes + 0.1 * tree.depth,
    "dear to begin with": lambda tree: 1 + 0.6 * bool(tree.num_nodes),
}


def all_trees(depth, width, most_nodes):
    """Every tree whose siblings are of the lowest ranks, naively: all closed sets of paths."""
    paths = [p for d in range(1, depth + 1) for p in itertools.product(range(width), repeat=d)]
    for size in range(most_nodes + 1):
        for chosen in itertools.combinations(paths, size):
            known = {(), *chosen}
            if all(path[:-1] in known for path in chosen):
                yield DraftTree.from_paths(chosen)


def value_of(accuracies):
    """Tokens per step where distances are independent: 1 + the sum of all path probabilities."""

    def value(tree):
        total = 1.0
        for path in tree.paths:
            share = 1.0
            for distance, rank in enumerate(path):
                share *= accuracies[distance][rank]
            total += share
        return total

    return value


@pytest.mark.parametrize("accuracies", ACCURACIES.values(), ids=ACCURACIES)
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_the_choice_is_that_of_an_exhaustive_search(accuracies, cost):
    value = value_of(accuracies)
    best = max(value(tree) / cost(tree) for tree in all_trees(3, 2, 4))
    trees = candidate_trees(accuracies, value, node_counts=range(1, 5))
    [chosen] = best_drafts([[TunedDraft(of_tree(t), value(t), cost(t)) for t in trees]])
    assert chosen.speed_up == pytest.approx(best)


def test_where_drafting_cannot_win_nothing_is_drafted():
    value, cost = value_of(ACCURACIES["useless"]), COSTS["steep"]
    trees = candidate_trees(ACCURACIES["useless"], value)
    [chosen] = best_drafts([[TunedDraft(of_tree(t), value(t), cost(t)) for t in trees]])
    assert chosen.options == NOTHING
    assert chosen.speed_up == 1


def test_where_only_chains_can_be_verified_only_chains_are_candidates():
    accuracies = ACCURACIES["steady"]
    trees = candidate_trees(accuracies, value_of(accuracies), takes_trees=False)
    assert [tree.num_nodes for tree in trees] == [0, 1, 2, 3]
    assert all(tree.is_chain for tree in trees)


def test_rows_in_step_emit_what_the_shortest_of_them_does():
    steps = [1, 2, 2, 4]
    naive = [min(pair) for pair in itertools.product(steps, repeat=3)]
    assert steps_together(steps, 3) == pytest.approx(sum(naive) / len(naive))
    assert steps_together(steps, 1) == sum(steps) / len(steps)


def answers_of(model):
    tokenizer = tiny_tokenizer()
    answers = []
    for text in PROMPTS["maths"] + PROMPTS["chat"]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        sequence = model.generate(ids, **{**GREEDY, "max_new_tokens": 24})
        answers.append(Example(sequence[0].tolist(), ids.shape[1]))
    return answers


def test_each_batch_size_gets_its_own_drafts():
    model = tiny_model(leap_offsets=(2, 3))
    answers = answers_of(model)
    report, ranks = evaluate_heads(model, answers)
    asked = []

    def timer(trees, batch_size):
        asked.append(batch_size)
        return {tree: 1 + (batch_size - 1) * tree.num_nodes for tree in trees}

    chosen = choose_drafts(model, report, ranks, answers, (1, 8), timer)
    assert asked == [1, 8]
    assert [draft.speed_up for draft in chosen[1]] == sorted(
        (draft.speed_up for draft in chosen[1]), reverse=True
    )
    by_kind = {frozenset(draft.options): draft for draft in chosen[1]}
    assert frozenset({"draft_nodes", "draft_threshold"}) in by_kind
    assert any("prompt_lookup_num_tokens" in kind for kind in by_kind)
    [static] = [d for d in chosen[1] if "draft_nodes" not in d.options]
    paths = (
        static.options.get("draft_tree") or DraftTree.chain(static.options["draft_length"]).paths
    )
    assert static.tokens_per_step == pytest.approx(
        tokens_per_step(ranks, answers, DraftTree.from_paths(paths))
    )
    assert chosen[8][0].options == NOTHING


def test_a_simulated_draft_emits_what_decoding_does():
    model = tiny_model(leap_offsets=(2, 3))
    for answer in answers_of(model):
        states = answer_states(model, answer)
        for options in (
            {"draft_length": 2},
            {"draft_nodes": 9},
            {"draft_nodes": 9, "draft_threshold": 0.02, "prompt_lookup_num_tokens": 6},
        ):
            drafter = model.new_drafter(LMTPSettings(use_lmtp=True, **options), Tier.TREE)
            steps = simulate(drafter, answer, states)
            prompt = torch.tensor([answer.input_ids[: answer.answer_start]])
            new_tokens = len(answer.input_ids) - answer.answer_start
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                use_lmtp=True,
                return_dict_in_generate=True,
                **{**GREEDY, "max_new_tokens": new_tokens},
                **options,
            )
            assert [step.tokens for step in steps] == output.acceptance_lengths[0]
            assert any(step.nodes for step in steps)


def test_in_a_batch_the_row_with_the_most_candidates_costs():
    nodes, costs = [0, 1, 1, 3], _Costs({0: 1.0, 1: 1.5, 3: 3.5})
    for size in (1, 2, 3):
        most = [max(rows) for rows in itertools.product(nodes, repeat=size)]
        naive = sum({0: 1.0, 1: 1.5, 3: 3.5}[count] for count in most) / len(most)
        assert costs.mean(nodes, size) == pytest.approx(naive)
    assert costs.mean([2], 1) == pytest.approx(2.5)  # between measured numbers


def test_steps_are_timed_with_all_that_belongs_to_them():
    trees = [DraftTree(), DraftTree.chain(2), DraftTree.from_paths([(0,), (1,), (0, 0)])]
    for size in (1, 2):
        seconds = step_seconds(tiny_model(), [[3, 4, 5], [3, 4, 5, 6]], trees, size, rounds=1)
        assert set(seconds) == set(trees)
        assert min(seconds.values()) > 0


def sizes_of_passes(model, rows, **options):
    sizes = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: sizes.append(tuple(args[0].shape))
    )
    ids = torch.arange(3, 9).expand(rows, -1).clone()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
    handle.remove()
    return output, {size[1] for size in sizes[1:] if size[0] == rows}


def test_generate_obeys_the_draft_of_the_batch_size():
    model = tiny_model(head_context=0)
    sizes_of_passes(model, 1, use_lmtp=True)  # so that what fits is found out
    model.generation_config.draft_by_batch_size = {
        "1": {"draft_tree": [[0], [0, 0]]},
        "4": {"draft_length": 1},
        "8": {"draft_length": 0},
    }
    for rows, nodes in [(1, 2), (2, 1), (4, 1), (5, 0), (8, 0), (9, 0)]:
        plain, _ = sizes_of_passes(model, rows)
        output, sizes = sizes_of_passes(model, rows, use_lmtp=True)
        assert output.tolist() == plain.tolist()
        assert max(sizes) == 1 + nodes, rows
    assert max(sizes_of_passes(model, 8, use_lmtp=True, draft_length=3)[1]) == 4


def test_what_is_said_for_all_batch_sizes_goes_before():
    table = {"1": {"draft_nodes": 9, "draft_threshold": 0.1, "prompt_lookup_num_tokens": 10}}
    settings = LMTPSettings(draft_by_batch_size=table, prompt_lookup_num_tokens=3).for_batch(2)
    assert settings == LMTPSettings(draft_nodes=9, draft_threshold=0.1, prompt_lookup_num_tokens=3)
    table["4"] = {"draft_length": 2}
    settings = LMTPSettings(draft_by_batch_size=table, draft_threshold=0.5)
    settings.check(horizon=3)
    assert settings.for_batch(1).draft_threshold == 0.5
    assert settings.for_batch(4) == LMTPSettings(draft_length=2)


def test_a_draft_hides_those_of_later_places_with_their_threshold():
    config = GenerationConfig(draft_nodes=16, draft_threshold=0.1)
    chain = LMTPSettings.take_from({"draft_length": 2}, config)
    assert chain == LMTPSettings(draft_length=2)
    stricter = LMTPSettings.take_from({"draft_threshold": 0.3}, config)
    assert stricter == LMTPSettings(draft_nodes=16, draft_threshold=0.3)


def test_a_tree_without_nodes_is_plain_decoding_and_says_so(monkeypatch):
    model, said = tiny_model(), []
    logger = logging.get_logger("modeling_lmtp.generation_lmtp")
    monkeypatch.setattr(logger, "warning_once", said.append)
    called = []
    monkeypatch.setattr(model, "head_states", lambda: called.append(1))
    ids = torch.tensor([[3, 4, 5], [5, 6, 7]])
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    plain = model.generate(ids, **options, output_scores=True)
    output = model.generate(ids, use_lmtp=True, draft_tree=[], **options, output_scores=True)
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert output.acceptance_lengths == [[1] * 11] * 2
    assert len(output.scores) == len(plain.scores) == 12
    assert not called
    assert "decodes plainly here" in said[0]
    assert "batch size 2" in said[0]


def test_acceptance_lengths_of_plain_rows_stop_at_their_end():
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5]])
    options = {**GREEDY, "return_dict_in_generate": True, "use_lmtp": True, "draft_length": 0}
    free = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    end = free.sequences[0, 3 + 4].item()
    first = free.sequences[0, 3:].tolist().index(end)
    ended = model.generate(
        ids, attention_mask=torch.ones_like(ids), **{**options, "eos_token_id": end}
    )
    assert ended.acceptance_lengths == [[1] * first]


@pytest.mark.parametrize("table", [{}, {"0": {}}, {"one": {}}], ids=str)
def test_drafts_by_batch_size_need_batch_sizes(table):
    with pytest.raises(ValueError, match="must map batch sizes to draft settings"):
        LMTPSettings(draft_by_batch_size=table).check(horizon=3)


@pytest.mark.parametrize(
    "draft",
    [[[0]], {"temperature": 2}, {"draft_nodes": 3, "draft_length": 1}, {"draft_by_batch_size": {}}],
    ids=str,
)
def test_a_draft_of_a_batch_size_has_one_shape_and_nothing_strange(draft):
    with pytest.raises(ValueError, match=r"draft_by_batch_size\['1'\] must be a dict"):
        LMTPSettings(draft_by_batch_size={"1": draft}).check(horizon=3)


def test_drafts_by_batch_size_may_not_be_too_deep_for_the_heads():
    table = {"1": {"draft_length": 1}, "2": {"draft_tree": [[0], [0, 0]]}}
    with pytest.raises(ValueError, match="2 tokens deep, but these leap heads can draft 1"):
        LMTPSettings(draft_by_batch_size=table).check(horizon=1)


def test_the_fastest_draft_is_written_and_nothing_where_all_lost(tmp_path):
    model = tiny_model()
    model.generation_config.draft_nodes = 2
    model.generation_config.draft_threshold = 0.5
    chain, tree = (
        TunedDraft({"draft_length": 2}, 1.5, 1.2),
        TunedDraft({"draft_nodes": 4}, 1.6, 1.1),
    )
    verdicts = {
        1: Verdict([Trial(tree, 1.1), Trial(chain, 1.2)]),
        2: Verdict([Trial(chain, 0.99)]),
        4: Verdict([]),
    }
    set_drafts(model, verdicts, {"quiet": True})
    model.save_pretrained(tmp_path)
    saved = LMTPForCausalLM.from_pretrained(tmp_path).generation_config
    assert saved.draft_by_batch_size == {"1": {"draft_length": 2}, "2": NOTHING, "4": NOTHING}
    assert getattr(saved, "draft_nodes", None) is None
    assert getattr(saved, "draft_threshold", None) is None
    assert saved.draft_conditions["quiet"] is True
    assert len(saved.draft_conditions["tried"]["1"]) == 2


@pytest.mark.slow
def test_the_command_tunes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_run, "TRIAL_PROMPTS", 2)
    monkeypatch.setattr(tune_run, "TRIAL_TOKENS", 8)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", leap_offsets=(2,))
    rows = [{"prompt": text, "response": "the sea and the wind"} for text in PROMPTS["chat"]]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = lmtp("tune", checkpoint, "--answers", answers, "--batch_sizes", 1, 2)
    assert result.exit_code == 0, result.output
    saved = json.loads((checkpoint / "generation_config.json").read_text())
    assert set(saved["draft_by_batch_size"]) == {"1", "2"}
    assert {"device", "dtype", "threads", "tried"} <= set(saved["draft_conditions"])
    assert "is no folder to write" in error_of("tune", "some/hub-id", "--answers", answers)
    with answers.open("a") as file:
        file.write('{"prompt": "no response"}\n')
    line = len(rows) + 1
    refused = error_of("tune", checkpoint, "--answers", answers, "--batch-sizes", "1")
    assert f"answers.jsonl:{line}:" in refused
    assert "--bad_rows skip" in refused
    chosen = []
    monkeypatch.setattr(
        tune_run, "tune", lambda model, examples, sizes: chosen.extend(examples) or {}
    )
    options = ["--answers", answers, "--bad-rows", "skip", "--num-answers", 2]
    assert lmtp("tune", checkpoint, *options).exit_code == 0
    every = tune_run.load_answers(answers, tiny_model(), tiny_tokenizer(), bad_rows="skip").examples
    assert chosen == [every[0], every[len(every) // 2]]  # spread over the file
    negative = error_of("tune", checkpoint, "--answers", answers, "--batch_sizes", 1, 0)
    assert "batch_sizes must be at least 1, got 0." in negative


def test_settings_that_contradict_each_other_do_not_keep_drafts_from_being_written(
    tmp_path, monkeypatch
):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", leap_offsets=(2,))
    file = checkpoint / "generation_config.json"
    before = {**json.loads(file.read_text()), "pad_token_id": -1, "temperature": 0.5}
    file.write_text(json.dumps(before))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "the sea", "response": "and the wind"}) + "\n")
    monkeypatch.setattr(tune_run, "tune", lambda *_: {})
    result = lmtp("tune", checkpoint, "--answers", answers)
    assert result.exit_code == 0, result.output
    after = json.loads(file.read_text())
    assert after.pop("draft_by_batch_size") == {}
    assert after.pop("draft_conditions")
    assert after == before


def test_an_adapter_is_not_tuned(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    error = error_of("tune", tmp_path, "--answers", tmp_path / "answers.jsonl")
    assert "is an adapter, which decodes as the checkpoint that it was trained on says" in error


def test_heads_are_tuned_on_what_they_have_not_learned(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", leap_offsets=(2,))
    rows = [{"prompt": text, "response": "the sea and the wind"} for text in PROMPTS["chat"] * 3]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = tune_run.load_answers(answers, tiny_model(), tiny_tokenizer()).examples
    record = {"examples": 4, "answers_sha256": file_sha256(answers)}
    (checkpoint / "provenance.json").write_text(json.dumps(record))
    chosen = []
    monkeypatch.setattr(
        tune_run, "tune", lambda model, examples, sizes: chosen.append(examples) or {}
    )
    told = lmtp("tune", checkpoint, "--answers", answers).output
    assert "Tuning on the 2 of these answers that the heads were not trained on." in told
    assert chosen == [split_examples(every, 2)[1]]
    (checkpoint / "provenance.json").write_text(json.dumps({**record, "examples": 6}))
    told = " ".join(lmtp("tune", checkpoint, "--answers", answers).output.split())
    assert "The heads were trained on all of these answers," in told
    assert chosen[1] == every
