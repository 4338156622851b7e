"""What vLLM's texts and steps are compared with: our own chain's in Transformers, prompt by prompt."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm_engine import Engine, Sampling, Steps, speculation

from modeling_lmtp import LMTPForCausalLM

BATCH = 8
LENGTH = 1024  # tokens of a request at most
Ids = list[int]


@dataclass
class Run:
    """What is compared, and how it went.

    Args:
        heads, base: folders.
        tokenizer: of the base.
        prompts: token ids.
        tokens: new tokens of a text at most.
        depth: tokens of a draft.
        dtype: of the model.
        texts: what each prompt's text should be.
        steps: how many steps our own chain takes for each; none if unknown.
        rows: the results.
    """

    heads: Path
    base: Path
    tokenizer: Any
    prompts: list[Ids]
    tokens: int
    depth: int
    dtype: str
    texts: list[Ids] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    rows: dict[str, Any] = field(default_factory=dict)

    def engine(self, with_heads: bool = True, **settings: Any) -> Engine:
        """Start vLLM with heads or without."""
        return Engine(
            model=str(self.base),
            dtype=self.dtype,
            max_model_len=LENGTH,
            speculative_config=speculation(self.heads if with_heads else None, self.depth),
            **{"max_num_seqs": BATCH, **settings},
        )

    def greedy(self, **more: Any) -> Sampling:
        """Return the settings of a greedy text."""
        return {"temperature": 0, "max_tokens": self.tokens, **more}

    def generate(self, engine: Engine, mixed: list[Sampling] | None = None) -> list[Any]:
        """Return the text of each prompt as vLLM's `CompletionOutput`."""
        settings = mixed or [{}]
        sampling = [self.greedy(**settings[i % len(settings)]) for i in range(len(self.prompts))]
        return [texts[0] for texts in engine.generate(self.prompts, sampling)]

    def compare(self, name: str, engine: Engine) -> None:
        """Compare the texts that an engine writes; see `record`."""
        texts = ids_of(self.generate(engine))
        self.record(name, engine.new_steps(), texts)

    def record(self, name: str, counted: Steps, texts: list[Ids], **more: Any) -> None:
        """Compare texts with the expected ones, and what vLLM counted with our own chain."""
        row = {"texts_equal": equal(texts, self.texts)}
        if counted.drafts:
            row |= {"steps": counted.drafts, "tokens_per_step": counted.tokens_per_step}
        if counted.drafts and self.steps:
            row["steps_of_our_chain"] = sum(self.steps)
        self.rows[name] = {**row, **more}
        print(name, self.rows[name], flush=True)


def equal(found: list[Any], expected: list[Any]) -> str:
    """Say how many are equal."""
    return f"{sum(a == b for a, b in zip(found, expected, strict=True))} of {len(expected)}"


def ids_of(outputs: list[Any]) -> list[Ids]:
    """Return the token ids of texts."""
    return [list(output.token_ids) for output in outputs]


def ask_transformers(run: Run) -> None:
    """Fill in the texts that our own chain writes in Transformers, and its steps for each."""
    model = LMTPForCausalLM.from_pretrained(run.heads, backbone=run.base, dtype=torch.float32)
    for start in range(0, len(run.prompts), BATCH):
        prompts = run.prompts[start : start + BATCH]
        inputs = run.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=run.tokens,
            do_sample=False,
            use_lmtp=True,
            draft_length=run.depth,
            return_dict_in_generate=True,
        )
        texts = output.sequences[:, inputs.input_ids.shape[1] :].tolist()
        run.texts += [until(model.generation_config.eos_token_id, ids) for ids in texts]
        run.steps += map(len, output.acceptance_lengths)


def until(end: int, ids: Ids) -> Ids:
    """Return ids up to and including the token that ends a text."""
    return ids[: ids.index(end) + 1] if end in ids else ids
