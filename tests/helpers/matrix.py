"""Compare L-MTP's text with plain decoding's for each architecture: `python tests/helpers/matrix.py`.

It examines the tiny random models of `architectures`, tries those of `all_causal_models`, and writes
`benchmarks/architectures.md` and `benchmarks/results/architectures.json`. `--part` runs one of the two,
`--models` tries a few causal models, and what was recorded of the others stays. The tests use the same
examination.

Shapes: `B` rows, `L` prompt length with padding, `T` prompt and new tokens.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import all_causal_models
import torch
from all_causal_models import Trial, try_all
from architectures import ARCHITECTURES, tiny_causal_lm
from drafters import CHAIN, RULES, TREE, Oracle, sometimes
from torch.nn.functional import pad
from transformers.utils import logging

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.support_lmtp import Tier, decoding_support
from modeling_lmtp.tree_lmtp import DraftTree

# On matrices this small, more threads only wait for each other.
torch.set_num_threads(1)

COMMAND = "python tests/helpers/matrix.py"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

RESULTS = BENCHMARKS / "results" / "architectures.json"
PARTS = ("architectures", "all_causal_models")

# Prompts within the windows of 16 tokens and beyond; all texts leave them behind
PROMPT_LENGTHS = (5, 19, 11)
NEW_TOKENS, NEW_TOKENS_OF_ROWS = 40, 24
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 20}
SEED = 5
PADDING = 0
CONDITIONS = {
    "models": "2 to 4 layers, 96 tokens, from `tests/helpers/architectures.py`",
    "dtype": "float32",
    "device": "CPU",
    "threads": 1,
    "prompt_lengths": PROMPT_LENGTHS,
    "new_tokens": NEW_TOKENS,
    "new_tokens_of_rows": NEW_TOKENS_OF_ROWS,
    "sampling": {**SAMPLING, "seed": SEED},
    "draft_tree": TREE.paths,
    "draft_chain": CHAIN.paths,
}

# Tied, it would only repeat its last token, and any draft of that would be right
LIVELIER: dict[str, dict[str, Any]] = {"gemma3n_text": {"tie_word_embeddings": False}}

KINDS = {
    "dense, rotary positions": (
        "llama llama_tied apertus arcee cohere ernie4_5 gemma glm glm4 granite helium "
        "hunyuan_v1_dense nemotron olmo olmo2 persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 "
        "stablelm starcoder2 codegen gpt_neox gptj falcon"
    ),
    "dense, learned or sinusoidal positions": "biogpt gpt2 gpt_bigcode openai-gpt opt xglm",
    "dense, ALiBi": "bloom falcon_alibi mpt",
    "encoder as decoder": "bert roformer",
    "sliding window": (
        "cohere2 exaone4 gemma2 gemma3_text gemma3n_text gpt_neo ministral mistral "
        "modernbert-decoder olmo3 phi3_sliding qwen2_sliding smollm3_sliding starcoder2_sliding"
    ),
    "experts": "aria_text dbrx glm4_moe granitemoe mixtral olmoe phimoe qwen2_moe qwen3_moe",
    "experts, sliding window": "gpt_oss",
    "experts, attention in chunks": "llama4_text",
    "latent attention": "minicpm3",
    "experts, latent attention": "deepseek_v2 deepseek_v3",
    "convolution and attention": "lfm2",
    "linear attention or state space, and attention": (
        "bamba falcon_h1 granitemoehybrid jamba minimax nemotron_h olmo_hybrid qwen3_5_text "
        "qwen3_next recurrent_gemma zamba2"
    ),
    "state space": "falcon_mamba mamba mamba2",
    "recurrent": "rwkv xlstm",
}  # fmt: skip
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Comparison:
    """One text, or one batch of texts, beside plain decoding's.

    Args:
        equal: whether all tokens are.
        acceptance_lengths: per row, the tokens that each pass emitted.
    """

    equal: bool
    acceptance_lengths: list[list[int]]


@dataclass
class Examination:
    """What one architecture showed.

    A row of a padded batch gets the text of its prompt alone if all comparisons are equal and
    `plain_rows_are_independent`.

    Args:
        architecture: its name in `ARCHITECTURES`.
        kind: what it is, for the reader.
        tier, reason, ragged: see `modeling_lmtp.support_lmtp.Support`.
        plain_is_consistent: whether plain decoding with a cache takes the tokens that a pass over
            its whole text would take; a Transformers release may have models for which it does not.
        greedy, sampling, batch: comparisons with plain decoding; batches are greedy.
        plain_rows_are_independent: whether plain decoding gives the rows of a padded batch the texts
            that it gives their prompts alone.
        distinct_tokens: how many different ones each prompt's greedy text has.
    """

    architecture: str
    kind: str
    tier: str
    reason: str
    ragged: bool
    plain_is_consistent: bool
    greedy: dict[str, Comparison] = field(default_factory=dict)
    sampling: dict[str, Comparison] = field(default_factory=dict)
    batch: dict[str, Comparison] = field(default_factory=dict)
    plain_rows_are_independent: bool | None = None
    distinct_tokens: list[int] = field(default_factory=list)


def prompts() -> list[torch.Tensor]:
    """Return prompts of different lengths, each `(1, length)`, without a token used for padding."""
    return [(torch.arange(n)[None] * 7 + 5 * row) % 95 + 1 for row, n in enumerate(PROMPT_LENGTHS)]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return prompts as one batch: `input_ids` and `attention_mask`, both `(B, L)`."""
    length = max(row.shape[1] for row in rows)
    padded = [pad(row, (length - row.shape[1], 0), value=PADDING) for row in rows]
    input_ids = torch.cat(padded)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PADDING).long()}


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Generate from the same seed, `NEW_TOKENS` greedily unless told otherwise."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    torch.manual_seed(SEED)
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def examine(architecture: str) -> Examination:
    """Examine one of `ARCHITECTURES`: what it can do, and whether what it does is exact."""
    backbone = tiny_causal_lm(architecture, **LIVELIER.get(architecture, {}))
    model = LMTPForCausalLM.from_backbone(backbone)
    support = decoding_support(backbone)
    single = left_padded(prompts()[:1])
    text = generate(backbone, single).sequences
    examination = Examination(
        architecture,
        KIND_OF[architecture],
        support.tier.value,
        support.reason,
        support.ragged,
        is_consistent(backbone, text),
    )
    if support.tier is Tier.PLAIN:
        examination.greedy["plain"] = compare(model, single, text, None)
    else:
        trees = {"tree": TREE, "chain": CHAIN} if support.tier is Tier.TREE else {"chain": CHAIN}
        compare_one_prompt(examination, model, text, trees)
        compare_batches(examination, model, text, trees)
    return examination


def compare_one_prompt(
    examination: Examination,
    model: LMTPForCausalLM,
    text: torch.Tensor,
    trees: dict[str, DraftTree],
) -> None:
    """Compare greedy texts, `text` `(1, T)` being plain decoding's, and samples of the first prompt."""
    single = left_padded(prompts()[:1])
    sample = generate(model.backbone, single, **SAMPLING).sequences
    for shape, tree in trees.items():
        for name, right in RULES.items():
            examination.greedy[f"{shape}, {name}"] = compare(
                model, single, text, Oracle(text, tree, right)
            )
        examination.sampling[shape] = compare(
            model, single, sample, Oracle(sample, tree, sometimes), **SAMPLING
        )


def compare_batches(
    examination: Examination,
    model: LMTPForCausalLM,
    text: torch.Tensor,
    trees: dict[str, DraftTree],
) -> None:
    """Compare greedy texts of all prompts, in a batch and alone; `text` `(1, T)` is the first one's."""
    options = {"max_new_tokens": NEW_TOKENS_OF_ROWS}
    texts = [text[:, : PROMPT_LENGTHS[0] + NEW_TOKENS_OF_ROWS]]
    shape, tree = next(iter(trees.items()))
    for prompt in prompts()[1:]:
        single = left_padded([prompt])
        texts.append(generate(model.backbone, single, **options).sequences)
        examination.greedy[f"{shape}, sometimes, prompt of {prompt.shape[1]}"] = compare(
            model, single, texts[-1], Oracle(texts[-1], tree, sometimes), **options
        )
    batch = left_padded(prompts())
    batch_texts = generate(model.backbone, batch, **options).sequences
    for shape, tree in trees.items():
        examination.batch[shape] = compare(
            model, batch, batch_texts, Oracle(batch_texts, tree, sometimes), **options
        )
    alone = [text[0, -NEW_TOKENS_OF_ROWS:].tolist() for text in texts]
    examination.plain_rows_are_independent = batch_texts[:, -NEW_TOKENS_OF_ROWS:].tolist() == alone
    examination.distinct_tokens = [len(set(tokens)) for tokens in alone]


@torch.no_grad()
def is_consistent(backbone: Any, text: torch.Tensor) -> bool:
    """Say whether one pass without a cache would take the tokens of a greedy text `(1, T)`."""
    logits = backbone(input_ids=text, use_cache=False).logits
    return torch.equal(logits.argmax(dim=-1)[:, -NEW_TOKENS - 1 : -1], text[:, -NEW_TOKENS:])


def compare(
    model: LMTPForCausalLM,
    inputs: dict[str, torch.Tensor],
    plain: torch.Tensor,
    drafter: Oracle | None,
    **options: Any,
) -> Comparison:
    """Generate with L-MTP and compare with plain texts `(B, T)`.

    An oracle that meets a text which is not the one it knows says so by an AssertionError.
    """
    output = generate(model, inputs, use_lmtp=True, drafter=drafter, **options)
    return Comparison(output.sequences.tolist() == plain.tolist(), output.acceptance_lengths)


HEADER = """\
# Architectures

Is the text of `generate(use_lmtp=True)` the text of the backbone's own `generate()`? Tried on one tiny
random model of each architecture ({models}), in {dtype},
on one thread of a {device}, with Transformers {transformers} and torch {torch}. All details are in
[results/architectures.json](results/architectures.json); `{command}` writes both files, and
`tests/modeling_lmtp/test_architectures.py` asserts what they say.

- *Tier*: the most that one verification may hold and still be exact, found out by trying and not from
  a name. A draft **tree**, a **chain**, or nothing: **plain** means that `use_lmtp=True` decodes plainly,
  and that one warning says why.
- *Batch*: whether a row of a batch goes on as far as its own draft was right (**ragged**), or as far as
  the drafts of all rows were (**in step**).
- *Greedy*: {new_tokens} tokens, their drafts always, never or sometimes right, as a tree (if the tier is
  tree) and as a chain.
- *Sampling*: {new_tokens} tokens from the same seed, in both shapes.
- *Batch texts*: three left-padded prompts of {prompt_lengths} tokens, {new_tokens_of_rows} new ones each,
  greedy, in both shapes; where ragged, rows get different numbers of tokens from a pass. Each is also the
  text that its prompt gets alone.

{summary}

| architecture | kind | tier | batch | greedy | sampling | batch texts | why not a tree |
|---|---|---|---|---|---|---|---|
"""


def report(examinations: list[Examination], found_versions: dict[str, str]) -> str:
    """Return the page that shows the examinations as a table."""
    lengths = "{}, {} and {}".format(*PROMPT_LENGTHS)
    conditions = {**CONDITIONS, **found_versions, "command": COMMAND, "prompt_lengths": lengths}
    header = HEADER.format(**conditions, summary=summary(examinations))
    return header + "".join(_table_row(examination) for examination in examinations)


def summary(examinations: list[Examination]) -> str:
    """Say in a sentence how many architectures are in which tier."""
    tiers = Counter(examination.tier for examination in examinations)
    return (
        f"Of {len(examinations)} architectures, {tiers['tree']} verify trees, {tiers['chain']} "
        f"chains, and {tiers['plain']} are decoded plainly."
    )


def _table_row(examination: Examination) -> str:
    if examination.tier == Tier.PLAIN.value:
        columns = ["", _verdict(examination.greedy), "", ""]
    else:
        independent = examination.plain_rows_are_independent
        columns = [
            "ragged" if examination.ragged else "in step",
            _verdict(examination.greedy),
            _verdict(examination.sampling),
            _verdict(examination.batch) + ("" if independent else ", but not to those alone"),
        ]
    reason = "" if examination.tier == Tier.TREE.value else examination.reason
    cells = [
        f"`{examination.architecture}`",
        examination.kind,
        examination.tier,
        *columns,
        reason.removeprefix("no trees: ").replace("|", "\\|").replace("<", "&lt;"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _verdict(comparisons: dict[str, Comparison]) -> str:
    different = [name for name, comparison in comparisons.items() if not comparison.equal]
    return f"differs: {'; '.join(different)}" if different else "equal"


ALL_HEADER = """
## All causal models

The table above is of configurations written by hand. Here every model type that `AutoModelForCausalLM`
knows in Transformers {transformers} is tried: its default configuration, reduced by
`tests/helpers/all_causal_models.py` to a few layers and {vocabulary} tokens; greedy, in float32,
{new_tokens} new tokens, for a prompt of {prompt_length} and for a left-padded batch of three prompts, of
{prompt_lengths} tokens, with drafts that are right two times in three. Where the tier is tree, a chain
is tried for 100 tokens as well; what is decoded plainly gets {new_tokens_plain} tokens.

{summary}

| tier | batch | models |
|---|---|---|
"""


def report_of_trials(trials: list[Trial], found_versions: dict[str, str]) -> str:
    """Return the section on all causal models: names by tier, then the reasons by model."""
    page = ALL_HEADER.format(
        vocabulary=all_causal_models.VOCABULARY,
        new_tokens=all_causal_models.NEW_TOKENS,
        new_tokens_plain=all_causal_models.NEW_TOKENS_PLAIN,
        prompt_length=all_causal_models.PROMPT_LENGTHS[0],
        prompt_lengths="{}, {} and {}".format(*all_causal_models.PROMPT_LENGTHS),
        summary=summary_of_trials(trials),
        **found_versions,
    )
    tiers, reasons = defaultdict(list), defaultdict(list)
    for trial in trials:
        batch = "ragged" if trial.ragged else "" if trial.tier in (None, "plain") else "in step"
        kind = trial.outcome if trial.outcome in ("wrong", "skipped") else str(trial.tier)
        tiers[kind, batch].append(f"`{trial.model_type}`")
        if kind != "tree":
            reason = trial.reason.removeprefix("no trees: ").replace("|", "\\|")
            reasons[kind, reason.replace("<", "&lt;")].append(f"`{trial.model_type}`")
    order = ("wrong", "tree", "chain", "plain", "skipped")
    for kind, batch in sorted(tiers, key=lambda key: order.index(key[0])):
        page += f"| {kind} | {batch} | {' '.join(tiers[kind, batch])} |\n"
    page += "\n| tier | why not a tree, or why skipped | models |\n|---|---|---|\n"
    for kind, reason in sorted(reasons, key=lambda key: order.index(key[0])):
        page += f"| {kind} | {reason} | {' '.join(reasons[kind, reason])} |\n"
    return page


def summary_of_trials(trials: list[Trial]) -> str:
    """Say in a sentence how many models have plain decoding's text."""
    outcomes = Counter(trial.outcome for trial in trials)
    return (
        f"Of {len(trials)} models, {outcomes['equal']} have plain decoding's texts, "
        f"{outcomes['plain']} are decoded plainly, {outcomes['wrong']} have other texts, and "
        f"{outcomes['skipped']} were skipped."
    )


def examine_all() -> list[Examination]:
    """Examine all architectures."""
    examinations = []
    for architecture in ARCHITECTURES:
        examinations.append(examine(architecture))
        print(f"{architecture}: {examinations[-1].tier}", flush=True)
    return examinations


def recorded() -> tuple[list[Examination], list[Trial]]:
    """Return what the file of results has."""
    record = json.loads(RESULTS.read_text())
    examinations = []
    for result in record["results"]:
        for name in ("greedy", "sampling", "batch"):
            result[name] = {key: Comparison(**value) for key, value in result[name].items()}
        examinations.append(Examination(**result))
    return examinations, [Trial(**trial) for trial in record.get("all_causal_models", [])]


def write(examinations: list[Examination], trials: list[Trial]) -> None:
    """Write the two files."""
    record = {"command": COMMAND, "conditions": CONDITIONS, "versions": versions()}
    page = f"{json.dumps(record, indent=1)[:-2]}"
    for name, results in (("results", examinations), ("all_causal_models", trials)):
        lines = ",\n".join(json.dumps(asdict(result)) for result in results)
        page += f',\n "{name}": [\n{lines}\n ]'
    RESULTS.write_text(page + "\n}\n")
    text = report(examinations, versions()) + report_of_trials(trials, versions())
    (BENCHMARKS / "architectures.md").write_text(text)


def main() -> None:
    """Examine all architectures, try all causal models, and write the two files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="run only this part")
    parser.add_argument("--models", nargs="+", help="try only these causal models")
    arguments = parser.parse_args()
    parts = arguments.part or (["all_causal_models"] if arguments.models else PARTS)
    logging.set_verbosity_error()
    examinations, trials = recorded()
    if "architectures" in parts:
        examinations = examine_all()
        write(examinations, trials)
    if "all_causal_models" in parts:
        by_type = {trial.model_type: trial for trial in trials}
        for trial in try_all(tuple(arguments.models or all_causal_models.MODEL_TYPES)):
            print(f"{trial.model_type}: {trial.outcome} ({trial.tier})", flush=True)
            by_type[trial.model_type] = trial
            known = [by_type[name] for name in all_causal_models.MODEL_TYPES if name in by_type]
            write(examinations, known)
    print(summary(examinations))
    print(summary_of_trials(recorded()[1]))


if __name__ == "__main__":
    main()
