"""Rolling a cache back: after each pass it keeps the accepted paths only.

Most layers are cropped. Recurrent states have no slots to crop, so they are copied and restored.

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

# Known tokens that a pass may replay. Beyond that, one pass without candidates makes a new copy of the
# states
MAX_REPLAY = 16


class CacheSlots:
    """The slots of a batch in a cache that grows: every row ends in the last one.

    Args:
        cache: holds the prompts, and later the rows that are still generating.
        num_prompt_slots: how many slots the prompts have used, with those of earlier turns and padding.

    Attributes:
        num_slots: how many slots are used now.
        num_replayed: how many known tokens before the roots the cache lacks; the next pass replays them.
        in_lockstep: whether all rows must accept the same number of tokens.
        needs_plain_pass: whether the next pass must run without candidates.
    """

    in_lockstep = False
    needs_plain_pass = False
    num_replayed = 0

    def __init__(self, cache: Cache, num_prompt_slots: int) -> None:
        self.cache = cache
        self.num_prompt_slots = num_prompt_slots

    @property
    def num_slots(self) -> int:
        """How many slots are used now."""
        return num_slots_of(self.cache)

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Keep each row's accepted nodes among the last pass's `num_slots` slots; drop the others."""
        keep_paths(self.cache, paths, num_slots)

    def undo_pass(self, num_slots: int) -> None:
        """Drop all of the last pass's `num_slots` slots."""
        self.cache.crop(-num_slots)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these of the present rows."""
        select_rows(self.cache, rows)

    def drop_padding(self, num_slots: int) -> None:
        """Drop the first slots, which are padding in every row."""
        move_left(self.cache, num_slots)


class ReplayedSlots(CacheSlots):
    """Slots beside the recurrent states of linear-attention and state-space layers.

    A recurrent state cannot be cropped. It is copied while it is known to be right, restored when a
    candidate was rejected, and the tokens since then are replayed at the start of the next pass.
    Replaying is cheap, because a pass over a few tokens costs about as much as one over a single token.

    Args:
        cache, num_prompt_slots: see `CacheSlots`; the states must be right.
    """

    in_lockstep = True

    def __init__(self, cache: Cache, num_prompt_slots: int) -> None:
        super().__init__(cache, num_prompt_slots)
        # The first accepted path is that of the prompt's last token, which counts it
        self._num_slots = num_prompt_slots - 1
        self._copies = self._copy_states()

    @property
    def num_slots(self) -> int:
        """How many tokens the cache holds. It cannot say itself if none of its layers has slots."""
        return self._num_slots

    @property
    def needs_plain_pass(self) -> bool:  # type: ignore[override]
        """Whether the next pass replays so much that it must end with right states."""
        return self.num_replayed + 1 >= MAX_REPLAY

    def keep_paths(self, paths: Sequence[Sequence[int]], num_slots: int) -> None:
        """Keep the states if all candidates were accepted, else restore the last copy."""
        if min(map(len, paths)) == num_slots:
            self._num_slots += self.num_replayed + num_slots
            self.num_replayed = 0
            self._copies = self._copy_states()
            return
        self.undo_pass(num_slots)
        self.num_replayed += max(map(len, paths))

    def undo_pass(self, num_slots: int) -> None:
        """Restore the copy, and crop the attention layers to the same token."""
        for (states, index), copied in zip(recurrent_states(self.cache), self._copies, strict=True):
            states[index].copy_(copied)
        crop_attention(self.cache, self.num_replayed + num_slots)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these of the present rows, in the copy as well."""
        super().keep_rows(rows)
        self._copies = [copied[list(rows)] for copied in self._copies]

    def _copy_states(self) -> list[torch.Tensor]:
        return [states[index].clone() for states, index in recurrent_states(self.cache)]


def slots_of(cache: Cache, num_tokens: int) -> CacheSlots:
    """Return the slots of a batch whose prompts have been run.

    Args:
        cache: holds the prompts.
        num_tokens: of the prompts, for a cache without slots.
    """
    kind = ReplayedSlots if has_recurrent_states(cache) else CacheSlots
    return kind(cache, num_slots_of(cache, num_tokens))
