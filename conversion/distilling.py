"""`lmtp distill`: gather prompts, then let the backbone answer them."""

from pathlib import Path

from modeling_lmtp.conversion.loading import load_backbone, load_tokenizer
from modeling_lmtp.training.distill import DistillReport, DistillSettings, append_rows, distill
from modeling_lmtp.training.prompts import Prompt, read_prompts, self_written_prompts


def distill_from(
    source: str,
    output: Path,
    settings: DistillSettings,
    *,
    prompts: Path | None,
    field: str,
    self_written: int,
    limit: int | None,
    dtype: str,
) -> DistillReport:
    """Answer the prompts of a file, those that the model writes itself, or both.

    Self-written prompts are kept in a file beside `output`, so that a stopped run goes on with the
    same ones.

    Raises:
        ValueError: no prompts were asked for, or a row of the file has none (names file and line).
    """
    if prompts is None and not self_written:
        raise ValueError(
            "There is nothing to answer: pass --prompts FILE, --self-written N, or both."
        )
    gathered: list[Prompt] = read_prompts(prompts, field)[:limit] if prompts is not None else []
    model, tokenizer = load_backbone(source, dtype), load_tokenizer(source)
    if self_written:
        written = Path(f"{output}.prompts.jsonl")
        if not written.exists():
            found = self_written_prompts(model, tokenizer, self_written, settings)
            append_rows(written, [{"prompt": p.text, "kind": p.kind} for p in found])
        gathered += read_prompts(written)[:self_written]
    return distill(model, tokenizer, gathered, output, settings)
