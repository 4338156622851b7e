"""The tokens generated so far, row by row, and who is told of them.

Shapes: `B` rows, `L` prompt length.
"""

from collections.abc import Sequence

import torch
from transformers.generation import BaseStreamer

from .acceptance_lmtp import AcceptedPath


class Texts:
    """What each row of a call has emitted.

    Args:
        prompts: `(B, L)`.
        pad_token_id: what follows a row that has ended before others.
        streamer: receives each token once, in order.

    Attributes:
        emitted: per row the tokens after its prompt.
        acceptance_lengths: per row the tokens that each pass gave, that of the prompt left out.
    """

    def __init__(
        self, prompts: torch.Tensor, pad_token_id: int, streamer: BaseStreamer | None = None
    ) -> None:
        self.prompts = prompts
        self.pad_token_id = pad_token_id
        self.streamer = streamer
        self.emitted: list[list[int]] = [[] for _ in prompts]
        self.acceptance_lengths: list[list[int]] = [[] for _ in prompts]
        self._num_streamed = 0

    def length(self, row: int) -> int:
        """Return how long a row is, with its prompt."""
        return self.prompts.shape[1] + len(self.emitted[row])

    def emit(self, rows: Sequence[int], paths: Sequence[AcceptedPath]) -> None:
        """Append the accepted tokens, and stream them."""
        for row, path in zip(rows, paths, strict=True):
            if self.emitted[row]:
                self.acceptance_lengths[row].append(len(path.tokens))
            self.emitted[row] += path.tokens
        if self.streamer is not None:
            for token in self.padded(self._num_streamed):
                self.streamer.put(torch.tensor(token))
            self._num_streamed = max(len(tokens) for tokens in self.emitted)

    def padded(self, start: int = 0) -> list[list[int]]:
        """Return the emitted tokens step by step from `start` on, one of each row."""
        rows = [tokens[start:] for tokens in self.emitted]
        longest = max(map(len, rows))
        padded = [tokens + [self.pad_token_id] * (longest - len(tokens)) for tokens in rows]
        return [list(step) for step in zip(*padded, strict=True)]

    def sequences(self) -> torch.Tensor:
        """Return prompts and texts, `(B, L + …)`."""
        emitted = torch.tensor(
            self.padded(), dtype=torch.long
        ).T  # as plain decoding, whatever the prompts
        return torch.cat([self.prompts, emitted.to(self.prompts.device)], dim=-1)
