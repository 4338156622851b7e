"""Prompt lookup: drafts copied from the text so far, where its last tokens occur once before.

Known as prompt lookup decoding, or n-gram speculation. It costs no model, and wins where the output
quotes its input. Shapes: `B` batch, `L` known tokens.
"""

import torch

from .drafting_lmtp import Candidates, Drafter
from .tree_lmtp import MAX_NODES, DraftTree

MIN_NGRAM_SIZE = 2  # one token alone says too little about the next


class PromptLookupDrafter(Drafter):
    """Proposes the tokens that followed the latest earlier occurrence of the last n-gram.

    Args:
        num_tokens: how many.
        max_ngram_size: the longest n-gram tried first.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, num_tokens: int, max_ngram_size: int | None = None) -> None:
        if not 1 <= num_tokens < MAX_NODES:
            raise ValueError(
                f"prompt_lookup_num_tokens must be from 1 to {MAX_NODES - 1}, got {num_tokens}."
            )
        max_ngram_size = 3 if max_ngram_size is None else max_ngram_size
        if max_ngram_size < 1:
            raise ValueError(f"max_matching_ngram_size must be 1 or more, got {max_ngram_size}.")
        self.num_tokens = self.max_nodes = num_tokens
        self.ngram_sizes = range(max_ngram_size, min(MIN_NGRAM_SIZE, max_ngram_size) - 1, -1)

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose one chain per row, or nothing where nothing matches."""
        length = min(self.num_tokens, max_depth)
        found = [self._continuation(row, length) for row in input_ids]
        return Candidates.of_rows([DraftTree.chain(len(row)) for row in found], found, input_ids)

    def _continuation(self, tokens: torch.Tensor, length: int) -> list[int]:
        """Return `length` tokens that may follow `tokens` `(L,)`, or none.

        Where the copy reaches the end of the text it goes on with itself: the text may be periodic.
        """
        for size in self.ngram_sizes:
            if len(tokens) <= size:
                continue
            ngrams = tokens[:-1].unfold(0, size, 1)  # all but the last itself
            matches = (ngrams == tokens[-size:]).all(dim=-1).nonzero()
            if len(matches):
                copied = tokens[int(matches[-1]) + size :].tolist()
                return [copied[i % len(copied)] for i in range(length)]
        return []
