"""`lmtp generate`: streams one answer to the terminal, or shows which of its tokens were drafted."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

from modeling_lmtp.conversion.command_line import console
from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer, prompt_tensors
from modeling_lmtp.conversion.options import Dtype, Options, Range
from modeling_lmtp.drafting_lmtp import HEAD, LOOKUP
from modeling_lmtp.outputs_lmtp import PLAIN, LMTPGenerateOutput, as_lmtp_output

from .comparison import TokenClock
from .figures import Timing

# Bold and underlined as well, because NO_COLOR drops colors alone
STYLES = {PLAIN: "none", HEAD: "bold green", LOOKUP: "underline cyan"}


@dataclass
class GenerateOptions(Options):
    """What to generate, and how."""

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a checkpoint with leap heads."})
    prompt: str = field(metadata={"help": "The prompt; the tokenizer's chat template is applied."})
    max_new_tokens: Annotated[int, Range(ge=1)] = field(
        default=256, metadata={"help": "Maximum length of the answer, in tokens."}
    )
    temperature: Annotated[float, Range(ge=0)] = field(
        default=0.0, metadata={"help": "Sample with this temperature; 0 is greedy search."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    plain: bool = field(default=False, metadata={"help": "Decode without leap heads."})
    show_drafts: bool = field(
        default=False,
        metadata={
            "help": "Print the answer when it is complete, each token styled by what drafted it."
        },
    )
    dtype: Dtype = field(default="auto", metadata={"help": "Dtype of the model."})


class ClockedTextStreamer(TextStreamer):
    """Prints text as it arrives, and records when."""

    def __init__(self, clock: TokenClock, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = clock

    def put(self, value: torch.Tensor) -> None:
        """Print the text that the token completes."""
        self.clock.put(value)
        super().put(value)


def generate(options: GenerateOptions) -> None:
    """Stream the answer to a prompt, and print its speed to stderr.

    Examples:
      lmtp generate OUT "Why is the sky blue?"
      lmtp generate OUT "Why is the sky blue?" --plain          for comparison, without drafts
      lmtp generate OUT "Why is the sky blue?" --show_drafts    what heads and lookup drafted
    """
    tokenizer = load_tokenizer(options.checkpoint)
    [input_ids] = prompt_tensors(tokenizer, [options.prompt], torch.device("cpu"))
    clock = TokenClock()
    output = _generate(options, tokenizer, input_ids, clock)
    if options.show_drafts:
        _show_drafts(tokenizer, output, input_ids.shape[1])
    print(_figures(output, clock.decoding_seconds), file=sys.stderr)


def _generate(
    options: GenerateOptions,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    clock: TokenClock,
) -> LMTPGenerateOutput:
    """Generate; unless drafts will be shown, print the answer as it arrives."""
    model = load_lmtp(options.checkpoint, options.dtype)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    printer = ClockedTextStreamer(clock, tokenizer, skip_prompt=True, skip_special_tokens=True)
    output: Any = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids, device=model.device),
        streamer=clock if options.show_drafts else printer,
        use_lmtp=not options.plain,
        max_new_tokens=options.max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
    )
    # A single row ends with its last token
    return as_lmtp_output(output, input_ids.shape[1], ()) if options.plain else output


def _figures(output: Any, seconds: float) -> str:
    """Return a line of figures, given the seconds after the prefill."""
    num_tokens, steps = len(output.token_sources[0]), len(output.acceptance_lengths[0])
    figures = f"{num_tokens} token{'s' if num_tokens != 1 else ''}"
    if not steps:  # the prefill emits an answer of one token
        return figures
    timing = Timing(num_tokens - 1, steps, seconds)
    return (
        f"{figures} in {steps} step{'s' if steps != 1 else ''} after the prefill: "
        f"{timing.tokens_per_step:.2f} tokens per step, "
        f"{sum(output.num_candidates[0]) / steps:.2f} candidates per step, "
        f"{timing.tokens_per_second:.1f} tokens/s"
    )


def _show_drafts(tokenizer: PreTrainedTokenizerBase, output: Any, prompt_length: int) -> None:
    """Print the answer with a style for each token's source, and a legend to stderr."""
    pieces = split_text(tokenizer, output.sequences[0, prompt_length:].tolist())
    [sources] = output.token_sources
    # Segments, because `Text` would expand tabs and drop control characters
    styled = [
        Segment(piece, Style.parse(STYLES[source]))
        for piece, source in zip(pieces, sources, strict=True)
    ]
    console.print(Segments([*styled, Segment.line()]))
    legend = Text("tokens by source: ")
    for number, (source, style) in enumerate(STYLES.items()):
        legend.append(f"{', ' if number else ''}{sources.count(source)} ").append(source, style)
    Console(stderr=True).print(legend, soft_wrap=True)


def split_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Return the characters that each token completes; joined, they are the decoded text."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces, start = [], 0
    for count in range(1, len(token_ids)):
        known = tokenizer.decode(token_ids[:count], skip_special_tokens=True)
        # An incomplete character decodes to a replacement character, which the text does not have there
        ends = range(len(known), start, -1)
        end = next((end for end in ends if text.startswith(known[start:end], start)), start)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
