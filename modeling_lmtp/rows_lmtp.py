"""The rows of a batch that are still generating, right-aligned beside the cache.

Rows accept different numbers of tokens. After each step, a row that accepted fewer is moved to the right,
so that all rows end in the last slot. To backbone, cache and masks, the batch looks left-padded.

Shapes: `A` rows, `L` known tokens of the longest row, `S` states, `H` hidden size, `Q = 1 + N` nodes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from .acceptance_lmtp import AcceptedPath
from .cache_lmtp import start_rollback
from .rollback_lmtp import CacheSlots


class Rows:
    """What the next step needs of each row, once the prompts have been run.

    Args:
        input_ids: the prompts, `(A, L)`; when a text is continued, perhaps only what its cache lacked.
        hidden_states: the states of the prompts' tokens, `(A, S, H)`, the latest last.
        num_states: how many states to keep.
        model_kwargs: what `generate` keeps between steps.
        slots: of the cache.
        can_drop_padding: whether slots that are padding in every row may be dropped; not if the backbone
            counts positions in slots.

    Attributes:
        indices: each row's index in the call's batch.
        input_ids: a token for each slot of the cache, then the roots, `(A, L)`. Slots that were filled in
            an earlier turn may have arbitrary tokens.
        new_states: the states of the last pass's nodes, `(A, Q, H)`.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        num_states: int,
        model_kwargs: dict[str, Any],
        slots: CacheSlots,
        can_drop_padding: bool = True,
    ) -> None:
        self.can_drop_padding = can_drop_padding
        self.indices = list(range(input_ids.shape[0]))
        self.num_states = num_states
        # The first accepted path is that of the prompt's last token, so its state counts as new
        self.hidden_states, self.new_states = hidden_states[:, :-1], hidden_states[:, -1:]
        self.model_kwargs = dict(model_kwargs)
        self.slots = slots
        missing = max(0, self.slots.num_prompt_slots - input_ids.shape[1])
        self.input_ids = pad(input_ids, (missing, 0))
        if self.model_kwargs.get("position_ids") is not None:
            self.model_kwargs["position_ids"] = self._last_positions()
        self._padding = self._count_padding()
        start_rollback(slots.cache)

    def _last_positions(self) -> torch.Tensor:
        """Return each row's last position, `(…, A, 1)`, from which later ones are counted."""
        positions = self.model_kwargs["position_ids"][..., -1:]
        return positions.expand(*positions.shape[:-2], len(self.indices), 1)

    def _count_padding(self) -> list[int]:
        """Return how many slots at the left of each row are padding."""
        attention_mask = self.model_kwargs.get("attention_mask")
        if attention_mask is None:
            return [0] * len(self.indices)
        return (attention_mask == 0).cumprod(dim=-1).sum(dim=-1).tolist()

    def commit(self, paths: Sequence[AcceptedPath], num_slots: int) -> None:
        """Append the accepted tokens, and keep the cache slots and states of the accepted nodes.

        Args:
            paths: one per row.
            num_slots: `1 + N`, the slots that the last pass appended to the cache.
        """
        lengths = [len(path.nodes) for path in paths]
        unfinished = {len(path.nodes) for path in paths if not path.finished}
        if self.slots.in_lockstep and len(unfinished) > 1:
            raise RuntimeError("Recurrent states cover all rows at once, so rows run in lockstep.")
        nodes = [path.nodes for path in paths]
        self.slots.keep_paths(nodes, num_slots)
        self._keep_states(nodes)
        self.input_ids = _append(self.input_ids, [path.tokens for path in paths])
        self._extend_model_kwargs(lengths)
        self._padding = [
            padding + max(lengths) - length
            for padding, length in zip(self._padding, lengths, strict=True)
        ]
        if len(paths) > 1:
            self._drop_padding(min(self._padding))

    def undo_pass(self, num_slots: int) -> None:
        """Drop the last pass's slots from the cache, because nothing of it will be committed.

        The cache of a single row then holds the tokens up to the last commit, in their places.

        Args:
            num_slots: as for `commit`.
        """
        self.slots.undo_pass(num_slots)

    def _keep_states(self, paths: Sequence[Sequence[int]]) -> None:
        states = torch.cat(
            [self.hidden_states, self.new_states.to(self.hidden_states.device)], dim=1
        )
        known = self.hidden_states.shape[1]
        num_kept = min(self.num_states, known + min(len(path) for path in paths))
        indices = [[*range(known), *(known + node for node in path)][-num_kept:] for path in paths]
        if len(indices) == 1:
            self.hidden_states = states[:, indices[0]]
        else:
            self.hidden_states = states[torch.arange(len(indices))[:, None], torch.tensor(indices)]

    def _extend_model_kwargs(self, lengths: Sequence[int]) -> None:
        model_kwargs, longest = self.model_kwargs, max(lengths)
        position_ids, attention_mask = (
            model_kwargs.pop(name, None) for name in ("position_ids", "attention_mask")
        )
        if model_kwargs.get("token_type_ids") is not None:  # new tokens have the last one's type
            last_type = model_kwargs["token_type_ids"][:, -1:]
            model_kwargs["token_type_ids"] = last_type.expand(-1, self.input_ids.shape[1])
        if position_ids is not None:
            counts = torch.tensor(lengths, device=position_ids.device)[:, None]
            model_kwargs["position_ids"] = position_ids + counts
        if attention_mask is None and min(lengths) < longest:
            known = self.input_ids.shape[1] - longest
            attention_mask = self.input_ids.new_ones((len(lengths), known))
        if attention_mask is not None:
            model_kwargs["attention_mask"] = _append(
                attention_mask, [[1] * length for length in lengths]
            )

    def _drop_padding(self, num_slots: int) -> None:
        """Drop the first slots, which are padding in every row."""
        if num_slots == 0 or not self.can_drop_padding:
            return
        self.slots.drop_padding(num_slots)
        self.input_ids = self.input_ids[:, num_slots:]
        # A token follows each state, so there is one state less than tokens
        self.hidden_states = self.hidden_states[:, 1 - self.input_ids.shape[1] :]
        self.model_kwargs["attention_mask"] = self.model_kwargs["attention_mask"][:, num_slots:]
        self._padding = [padding - num_slots for padding in self._padding]

    def keep(self, places: Sequence[int]) -> None:
        """Keep only these of the present rows."""
        index = torch.tensor(places)
        self.slots.keep_rows(places)
        self.indices = [self.indices[place] for place in places]
        self._padding = [self._padding[place] for place in places]
        self.input_ids = self.input_ids[index]
        self.hidden_states = self.hidden_states[index]
        for name, value in self.model_kwargs.items():
            if name == "position_ids" and value is not None:
                self.model_kwargs[name] = value[..., index, :]
            elif torch.is_tensor(value) and value.ndim > 1:
                self.model_kwargs[name] = value[index]
        self._drop_padding(min(self._padding))


def _append(columns: torch.Tensor, new: Sequence[Sequence[int]]) -> torch.Tensor:
    """Append new values to each row of `(A, L)`, and right-align the rows, with 0 on the left."""
    longest = max(len(values) for values in new)
    if all(len(values) == longest for values in new):
        return torch.cat(
            [columns, torch.tensor(new, dtype=columns.dtype, device=columns.device)], -1
        )
    appended = [
        torch.cat([
            columns.new_zeros(longest - len(values)), row, columns.new_tensor(values)
        ])
        for row, values in zip(columns, new, strict=True)
    ]  # fmt: skip
    return torch.stack(appended)
