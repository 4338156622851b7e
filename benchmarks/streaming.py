"""`lmtp generate`: stream one answer to the terminal."""

from typing import Any

import torch
from transformers import TextStreamer

from modeling_lmtp.conversion.loading import load_lmtp, load_tokenizer, prompt_tensors

from .comparison import TokenClock


class ClockedTextStreamer(TextStreamer):
    """Prints text as it comes, and notes when."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = TokenClock()

    def put(self, value: torch.Tensor) -> None:
        """Print what the token completes."""
        self.clock.put(value)
        super().put(value)


def stream_answer(
    checkpoint: str,
    prompt: str,
    *,
    dtype: str,
    seed: int,
    use_lmtp: bool,
    max_new_tokens: int,
    temperature: float,
) -> str:
    """Print the answer to `prompt` as it comes; return a line of figures."""
    tokenizer = load_tokenizer(checkpoint)
    [input_ids] = prompt_tensors(tokenizer, [prompt], torch.device("cpu"))
    model = load_lmtp(checkpoint, dtype)
    streamer = ClockedTextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    torch.manual_seed(seed)
    output: Any = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids, device=model.device),
        streamer=streamer,
        use_lmtp=use_lmtp,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **sampling,
    )
    new_tokens = output.sequences.shape[1] - input_ids.shape[1]
    seconds = streamer.clock.decoding_seconds
    figures = f"{new_tokens} tokens"
    if seconds:
        figures += f", {(new_tokens - 1) / seconds:.1f} tokens/s after the first"
    steps = output.acceptance_lengths[0] if use_lmtp else []
    if steps:  # an answer of one token has none
        figures += f", {sum(steps) / len(steps):.2f} tokens per step"
    return figures
