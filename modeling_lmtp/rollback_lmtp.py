"""Rolling a cache back: after each pass it keeps the accepted paths and nothing else.

Most layers are cropped. Recurrent states, which have no slots, are copied and put back.

Shapes: `N` candidates of a row.
"""

from collections.abc import Sequence

import torch
from transformers import Cache

from .cache_lmtp import (
    crop_attention,
    has_recurrent_states,
    keep_paths,
    move_left,
    num_slots_of,
    recurrent_states,
    select_rows,
)

# Known tokens that a pass may run again; then one pass without candidates gives a new copy
MAX_REPLAY = 16


class CacheSlots:
    """A batch's slots in a cache that grows: every row ends in the last one.

    Args:
        cache: holds the prompts, and later the rows that are still generating.
        num_prompt_slots: how many slots the prompts have used, those of earlier turns and padding
            included.

    Attributes:
        num_slots: how many slots are used now.
        num_replayed: how many known tokens before the roots the cache lacks; the next pass runs them again.
        in_step: whether all rows must accept equally many tokens.
        must_settle: whether the next pass must run without candidates.
    """

    in_step = False
    must_settle = False
    num_replayed = 0

    def __init__(self, cache: Cache, num_prompt_slots: int) -> None:
        self.cache = cache
        self.num_prompt_slots = num_prompt_slots

    @property
    def num_slots(self) -> int:
        """How many slots are used now."""
        return num_slots_of(self.cache)

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Keep, of the last pass's `num_slots` slots, those of each row's path; drop the rest."""
        keep_paths(self.cache, paths, num_slots)

    def take_back(self, num_slots: int) -> None:
        """Drop all of the last pass's `num_slots` slots."""
        self.cache.crop(-num_slots)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, by their place among the present ones."""
        select_rows(self.cache, rows)

    def move_left(self, num_slots: int) -> None:
        """Drop so many first slots, which are padding in every row."""
        move_left(self.cache, num_slots)


class ReplayedSlots(CacheSlots):
    """Slots beside recurrent states, of linear attention and state-space layers, which have no slots.

    Such a state cannot be cropped. It is copied while it is known to be right, put back when a candidate
    was rejected, and the tokens since then are run again at the head of the next pass: known tokens cost
    little there, because a pass over a few tokens costs about as much as one over a single token.

    Args:
        cache, num_prompt_slots: see `CacheSlots`; right as it is.
    """

    in_step = True

    def __init__(self, cache: Cache, num_prompt_slots: int) -> None:
        super().__init__(cache, num_prompt_slots)
        self._num_slots = (
            num_prompt_slots - 1
        )  # the first accepted path is that of the prompt's last token
        self._copies = self._copy_states()

    @property
    def num_slots(self) -> int:
        """How many tokens the cache knows; where no layer has slots, it cannot say so itself."""
        return self._num_slots

    @property
    def must_settle(self) -> bool:  # type: ignore[override]
        """Whether the next pass must run without candidates, because it runs much again."""
        return self.num_replayed + 1 >= MAX_REPLAY

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Keep the states if all candidates were right; else put the last copy back."""
        if min(map(len, paths)) == num_slots:
            self._num_slots += self.num_replayed + num_slots
            self.num_replayed = 0
            self._copies = self._copy_states()
            return
        self.take_back(num_slots)
        self.num_replayed += max(map(len, paths))

    def take_back(self, num_slots: int) -> None:
        """Put the copy back, and drop the slots that attention layers got since."""
        for (states, index), copied in zip(recurrent_states(self.cache), self._copies, strict=True):
            states[index].copy_(copied)
        crop_attention(self.cache, self.num_replayed + num_slots)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in the copy as well."""
        super().keep_rows(rows)
        self._copies = [copied[list(rows)] for copied in self._copies]

    def _copy_states(self) -> list[torch.Tensor]:
        return [states[index].clone() for states, index in recurrent_states(self.cache)]


def slots_of(cache: Cache, num_tokens: int) -> CacheSlots:
    """Return what keeps the cache of a batch whose prompts have been run.

    Args:
        cache: holds the prompts.
        num_tokens: of the prompts; counts where the cache itself has no slots.
    """
    kind = ReplayedSlots if has_recurrent_states(cache) else CacheSlots
    return kind(cache, num_slots_of(cache, num_tokens))
