"""`lmtp generate`: streams one answer to the terminal."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from transformers import TextStreamer

from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer, prompt_tensors
from modeling_lmtp.conversion.options import Dtype, Options, Range

from .comparison import TokenClock
from .figures import Timing


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
    dtype: Dtype = field(default="auto", metadata={"help": "Dtype of the model."})


class ClockedTextStreamer(TextStreamer):
    """Prints text as it arrives, and records when."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = TokenClock()

    def put(self, value: torch.Tensor) -> None:
        """Print the text that the token completes."""
        self.clock.put(value)
        super().put(value)


def generate(options: GenerateOptions) -> None:
    """Stream the answer to a prompt, and print its speed to stderr.

    Examples:
      lmtp generate OUT "Why is the sky blue?"
      lmtp generate OUT "Why is the sky blue?" --plain        for comparison, without leap heads
    """
    print(stream_answer(options), file=sys.stderr)


def stream_answer(options: GenerateOptions) -> str:
    """Print the answer as it arrives; return a line of figures."""
    tokenizer = load_tokenizer(options.checkpoint)
    [input_ids] = prompt_tensors(tokenizer, [options.prompt], torch.device("cpu"))
    model = load_lmtp(options.checkpoint, options.dtype)
    streamer = ClockedTextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    output: Any = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids, device=model.device),
        streamer=streamer,
        use_lmtp=not options.plain,
        max_new_tokens=options.max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
    )
    new_tokens = output.sequences.shape[1] - input_ids.shape[1]
    steps = 0 if options.plain else len(output.acceptance_lengths[0])
    timing = Timing(new_tokens - 1, steps, streamer.clock.decoding_seconds)
    figures = f"{new_tokens} token{'s' if new_tokens != 1 else ''}"
    if timing.seconds:  # the prefill emits an answer of one token
        figures += f", {timing.tokens_per_second:.1f} tokens/s after the first"
    if timing.steps:
        figures += f", {timing.tokens_per_step:.2f} tokens per step"
    return figures
