"""Measures what the decoding loop costs, and what it gains if every candidate is right.

Three methods take turns, prompt by prompt: plain `generate`; L-MTP without a draft, whose time per step
over plain decoding's is the cost of the loop; and L-MTP with a drafter that knows the text and proposes a
chain of 8, whose speed-up is the best that the loop can give.

    python benchmarks/scripts/loop_cost.py CHECKPOINT --output benchmarks/results/loop_cost.json
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.benchmarks.comparison import TokenClock
from modeling_lmtp.conversion.loading import (
    first_prompts,
    load_lmtp,
    load_tokenizer,
    prompt_tensors,
)
from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.drafting_lmtp import Candidates, Drafter
from modeling_lmtp.tree_lmtp import DraftTree

CHAIN_LENGTH = 8


class KnownText(Drafter):
    """Proposes what is known to come, `CHAIN_LENGTH` tokens at a time."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose the tokens that follow."""
        known = input_ids.shape[1]
        following = self.tokens[:, known : known + min(CHAIN_LENGTH, max_depth)]
        return Candidates((DraftTree.chain(following.shape[1]),), following)


class Nothing(Drafter):
    """Proposes nothing: the loop runs, where settings that draft nothing would decode plainly."""

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose nothing."""
        return Candidates.none(input_ids)


def seconds_per_token(
    model: LMTPForCausalLM, prompt: torch.Tensor, **options: Any
) -> tuple[float, torch.Tensor]:
    """Generate greedily; return the seconds per token after the first, and the sequence."""
    clock = TokenClock()
    tokens: Any = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        eos_token_id=None,
        streamer=clock,
        **options,
    )
    return clock.decoding_seconds / (tokens.shape[1] - prompt.shape[1] - 1), tokens


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, and between what the values lie."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in named.items()}


def measure(
    model: LMTPForCausalLM, prompts: list[torch.Tensor], new_tokens: int, rounds: int
) -> dict[str, object]:
    """Let the three ways take turns."""
    loop_cost, speed_up, plain_ms = [], [], []
    num_equal = 0
    own_texts = [own_text(model, prompt, new_tokens) for prompt in prompts]
    for _ in range(rounds):
        for prompt, own in zip(prompts, own_texts, strict=True):
            options = {"max_new_tokens": new_tokens}
            plain, text = seconds_per_token(model, prompt, use_lmtp=False, **options)
            off, off_text = seconds_per_token(
                model, prompt, use_lmtp=True, drafter=Nothing(), **options
            )
            known, known_text = seconds_per_token(
                model, prompt, use_lmtp=True, drafter=KnownText(own), **options
            )
            assert torch.equal(known_text, own)
            plain_ms.append(plain * 1e3)
            loop_cost.append(off / plain)
            speed_up.append(plain / known)
            num_equal += torch.equal(text, off_text) and torch.equal(text, own)
    return {
        "plain_ms_per_token": spread(plain_ms),
        "loop_cost": spread(loop_cost),
        "speed_up_of_a_known_chain": spread(speed_up),
        "equal_texts": f"{num_equal} of {rounds * len(prompts)}",
    }


def own_text(model: LMTPForCausalLM, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Generate the text whose every candidate is right when it is known.

    In 16 bits that may be another than plain decoding's: passes over nine tokens round differently.
    """
    options = {"max_new_tokens": new_tokens}
    _, text = seconds_per_token(model, prompt, use_lmtp=False, **options)
    while True:
        _, own = seconds_per_token(model, prompt, use_lmtp=True, drafter=KnownText(text), **options)
        if torch.equal(own, text):
            return own
        text = own


def main() -> None:
    """Measure one checkpoint and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parents[1] / "prompts.jsonl")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=97)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    texts = first_prompts(arguments.prompts, "prompt", arguments.num_prompts)
    results = {}
    for dtype in arguments.dtypes:
        model = load_lmtp(arguments.checkpoint, dtype)
        prompts = prompt_tensors(load_tokenizer(arguments.checkpoint), texts, model.device)
        measure(model, prompts[:1], 16, 1)  # warm-up
        results[dtype] = measure(model, prompts, arguments.new_tokens, arguments.rounds)
    record = {
        "command": "benchmarks/scripts/loop_cost.py",
        "base_model": model.config.base_model_name_or_path,
        "prompts": arguments.prompts.name,
        "num_prompts": arguments.num_prompts,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "chain_length": CHAIN_LENGTH,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "results": results,
    }
    print(json.dumps(record, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
