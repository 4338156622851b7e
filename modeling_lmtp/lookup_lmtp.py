"""Prompt lookup: drafts copied from the text so far, from where its last tokens stand once before.

Known as prompt lookup decoding, or n-gram speculation. It costs no model, and wins where the output
quotes its input. Shapes: `B` batch, `L` known tokens.
"""

import torch
from torch.nn.functional import pad

from .drafting_lmtp import Candidates, Drafter
from .tree_lmtp import MAX_NODES, DraftTree

COPIED_PER_MATCH = 3  # the more tokens agree, the further the copy is likely to be right


class PromptLookupDrafter(Drafter):
    """Proposes the tokens that followed the longest n-gram which the text also ends in.

    Of several occurrences the latest is copied, `COPIED_PER_MATCH` tokens for each one of the n-gram.

    Args:
        num_tokens: how many at most.
        max_ngram_size: the longest n-gram looked for.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, num_tokens: int, max_ngram_size: int | None = None) -> None:
        if not 1 <= num_tokens < MAX_NODES:
            raise ValueError(
                f"prompt_lookup_num_tokens must be from 1 to {MAX_NODES - 1}, got {num_tokens}."
            )
        max_ngram_size = 6 if max_ngram_size is None else max_ngram_size
        if max_ngram_size < 1:
            raise ValueError(f"max_matching_ngram_size must be 1 or more, got {max_ngram_size}.")
        self.num_tokens = self.max_nodes = num_tokens
        self.max_ngram_size = max_ngram_size

    def draft(
        self, input_ids: torch.Tensor, hidden_states: torch.Tensor, max_depth: int
    ) -> Candidates:
        """Propose one chain per row, or nothing where nothing matches."""
        length = min(self.num_tokens, max_depth)
        if length == 0 or input_ids.shape[1] < 2:
            return Candidates.none(input_ids)
        sizes, tokens = self._copies(input_ids, length)
        both = torch.cat([sizes, tokens], dim=1).tolist()  # one transfer to the host
        found = [row[1 : 1 + COPIED_PER_MATCH * row[0]] for row in both]
        return Candidates.from_rows([DraftTree.chain(len(row)) for row in found], found, input_ids)

    def _copies(self, input_ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the size of the longest n-gram, `(B, 1)`, and what followed it, `(B, length)`.

        Where the copy reaches the end of the text it goes on with itself: the text may be periodic.
        """
        num_known = input_ids.shape[1]
        agrees = torch.stack(
            [
                pad(
                    input_ids[:, : num_known - 1 - back] == input_ids[:, -1 - back, None], (back, 0)
                )
                for back in range(min(self.max_ngram_size, num_known - 1))
            ]
        )  # whether the token so far before each end of an n-gram is that before the text's end
        sizes = agrees.cumprod(dim=0).sum(dim=0)
        ends = torch.arange(num_known - 1, device=input_ids.device)
        end = (sizes * num_known + ends).argmax(dim=1, keepdim=True)
        steps = torch.arange(length, device=input_ids.device) % (num_known - 1 - end)
        return sizes.gather(1, end), input_ids.gather(1, end + 1 + steps)
