"""Profiles a decoding step: the backbone's pass, and everything around it.

    python benchmarks/scripts/step_profile.py CHECKPOINT --output FILE

Each kind of draft decodes the same prompts, and takes turns with the *bare pass*: the backbone alone on
as many tokens after as many cached ones, with Transformers' cache and mask. The figures are medians in
milliseconds; `overhead` is a step over a bare pass. Only steps with a full draft count. Parts are timed
on the host: on an accelerator, which works asynchronously, only whole steps are meaningful.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from modeling_lmtp.acceptance_lmtp import GreedyAcceptor
from modeling_lmtp.benchmarks.conditions import base_name, device_name
from modeling_lmtp.benchmarks.drafts_to_try import drafts_to_try
from modeling_lmtp.benchmarks.pass_clock import synchronize
from modeling_lmtp.benchmarks.quiet import measure_quietness, quiet_record
from modeling_lmtp.cache_lmtp import new_cache
from modeling_lmtp.conversion.loading import first_prompts, load_lmtp, load_tokenizer
from modeling_lmtp.conversion.prompts import render_prompt
from modeling_lmtp.conversion.saving import versions
from modeling_lmtp.decoding_lmtp import Decoder
from modeling_lmtp.modeling_lmtp import LMTPForCausalLM
from modeling_lmtp.outputs_lmtp import EmittedTokens
from modeling_lmtp.rows_lmtp import Rows
from modeling_lmtp.support_lmtp import decoding_support
from modeling_lmtp.transformers_lmtp import forward_with_cache
from modeling_lmtp.verification_lmtp import Verifier

PROMPTS = Path(__file__).parents[1] / "held_out.jsonl"
WARM_STEPS = 3
PLANNED_NODES = 7
PARTS: dict[str, tuple[type, str]] = {
    "draft": (Decoder, "_draft"),
    "verify": (Verifier, "verify"),
    "walk": (GreedyAcceptor, "accept"),
    "commit": (Rows, "commit"),
    "emit": (EmittedTokens, "emit"),
}


class StepClock:
    """The seconds of each part of each step of one call of `generate`."""

    def __init__(self, model: LMTPForCausalLM) -> None:
        self.model = model
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.starts: list[float] = []  # of the passes
        self.sizes: list[int] = []

    def clear(self) -> None:
        """Forget what was timed so far."""
        self.parts.clear()
        self.starts.clear()
        self.sizes.clear()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Time the parts."""
        backbone = self.model.backbone
        with ExitStack() as stack:
            for name, (owner, method) in PARTS.items():
                timed = self._timed(name, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, timed))
            stack.enter_context(
                mock.patch.object(backbone, "forward", self._timed("pass", backbone.forward))
            )
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # its signature is looked at
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            if name == "pass":
                self.starts.append(started)
                self.sizes.append(kwargs["input_ids"].shape[1])
            result = function(*args, **kwargs)
            self.parts[name].append(time.perf_counter() - started)
            return result

        return timed

    def steps(self) -> list[dict[str, float]]:
        """Return the parts of each step with a full draft: from the start of a draft to the next."""
        found = []
        full = max(self.sizes[1:])
        for number in range(1 + WARM_STEPS, len(self.starts) - 1):
            if self.sizes[number] == full:
                step = {"step": self.starts[number + 1] - self.starts[number]}
                step |= {name: self.parts[name][number] for name in ("pass", "walk", "commit")}
                step["emit"] = self.parts["emit"][number]
                step["draft"] = self.parts["draft"][number]
                step["arrange"] = self.parts["verify"][number - 1] - self.parts["pass"][number]
                found.append(step)
        return found


def bare_passes(
    model: LMTPForCausalLM, prompt: torch.Tensor, num_tokens: int, count: int
) -> list[float]:
    """Time the backbone over `num_tokens` tokens behind a prompt `(1, L)`."""
    cache = new_cache(model.backbone.config)
    forward_with_cache(model.backbone, cache, input_ids=prompt, logits_to_keep=1)
    found = []
    for _ in range(count):
        synchronize(model.device)
        started = time.perf_counter()
        forward_with_cache(model.backbone, cache, input_ids=prompt[:, -num_tokens:])
        synchronize(model.device)
        found.append(time.perf_counter() - started)
        cache.crop(-num_tokens)
    return found[WARM_STEPS:]


def profile(
    model: LMTPForCausalLM,
    prompts: Sequence[torch.Tensor],
    ways: Mapping[str, dict[str, Any]],
    new_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Let the ways and the bare passes take turns; return a row per way."""
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    bare: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for turn in range(1 + rounds):
        for prompt in prompts:
            for name, options in ways.items():
                clock = StepClock(model)
                with clock.listening():
                    # Tried again, as its forward is another
                    decoding_support(model.backbone, single_row=True)
                    clock.clear()
                    model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        do_sample=False,
                        eos_token_id=None,
                        max_new_tokens=new_tokens,
                        use_lmtp=True,
                        **options,
                    )
                sizes[name] = max(clock.sizes[1:])
                passes = bare_passes(model, prompt, sizes[name], WARM_STEPS + 12)
                if turn:
                    steps[name] += clock.steps()
                    bare[name] += passes
    return [_row(name, sizes[name], steps[name], bare[name]) for name in ways]


def _row(
    name: str, size: int, steps: Sequence[Mapping[str, float]], bare: Sequence[float]
) -> dict[str, Any]:
    parts = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
    bare_pass = statistics.median(bare)
    return {
        "way": name,
        "tokens": size,
        "steps": len(steps),
        "bare_pass_ms": round(bare_pass * 1e3, 3),
        **{f"{part}_ms": round(seconds * 1e3, 3) for part, seconds in parts.items()},
        "overhead": round(parts["step"] / bare_pass, 3),
    }


def ways_of(model: LMTPForCausalLM) -> dict[str, dict[str, Any]]:
    """Return what `generate` is told, by name; of planned steps, those with a full draft count."""
    return {**drafts_to_try(model), "planned": {"draft_nodes": PLANNED_NODES}}


def main() -> None:
    """Measure one checkpoint and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = load_lmtp(arguments.checkpoint, arguments.dtype)
    tokenizer = load_tokenizer(arguments.checkpoint)
    texts = first_prompts(arguments.prompts, "prompt", arguments.num_prompts)
    prompts = [
        torch.tensor([render_prompt(tokenizer, text)], device=model.device) for text in texts
    ]
    model.generate(prompts[0], use_lmtp=True, max_new_tokens=4)  # what is found out once per model
    before = measure_quietness(model.device)
    with torch.no_grad():
        rows = profile(model, prompts, ways_of(model), arguments.new_tokens, arguments.rounds)
    record = {
        "command": "python benchmarks/scripts/step_profile.py",
        "conditions": {
            "base_model": base_name(model),
            "leap_offsets": list(model.config.leap_offsets),
            "head_context": model.config.head_context,
            "draft_vocab_size": len(model.config.draft_token_ids or []),
            "device": device_name(model.device),
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "prompts": arguments.prompts.name,
            "prompt_tokens": [prompt.shape[1] for prompt in prompts],
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            **quiet_record(before, measure_quietness(model.device)),
            "versions": versions(),
        },
        "rows": rows,
    }
    print(json.dumps(record, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
