"""The rows of a batch that are still generating, kept flush right beside the cache.

Rows accept different lengths. After each step a row that accepted less is moved to the right, so that
all end in the last slot: to backbone, cache and masks the batch looks like a left-padded one.

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
    """What the next step needs of each row, after the prompts have been run.

    Args:
        input_ids: the prompts, `(A, L)`; of a text that goes on, perhaps only what the cache lacked.
        hidden_states: states of the prompts' tokens, `(A, S, H)`, the latest last.
        num_states: how many states to keep.
        model_kwargs: what `generate` keeps between steps.
        slots: keeps the cache.
        may_move: whether slots that have a meaning in no row may be dropped; not where the backbone
            counts its positions in slots.

    Attributes:
        numbers: each row's number among those of the call.
        input_ids: a token for each slot of the cache and the roots, `(A, L)`; in slots that were filled
            in an earlier turn they may be of no meaning.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        num_states: int,
        model_kwargs: dict[str, Any],
        slots: CacheSlots,
        may_move: bool = True,
    ) -> None:
        self.may_move = may_move
        self.numbers = list(range(input_ids.shape[0]))
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
        """Positions are counted on from the last ones, `(…, A, 1)`."""
        positions = self.model_kwargs["position_ids"][..., -1:]
        return positions.expand(*positions.shape[:-2], len(self.numbers), 1)

    def _count_padding(self) -> list[int]:
        """How many slots on each row's left have no meaning."""
        attention_mask = self.model_kwargs.get("attention_mask")
        if attention_mask is None:
            return [0] * len(self.numbers)
        return (attention_mask == 0).cumprod(dim=-1).sum(dim=-1).tolist()

    def commit(self, paths: Sequence[AcceptedPath], num_slots: int) -> None:
        """Append the accepted tokens, and keep the cache slots and states of the accepted nodes.

        Args:
            paths: one per row.
            num_slots: `1 + N`, the slots that the last pass appended to the cache.
        """
        lengths = [len(path.nodes) for path in paths]
        going = {len(path.nodes) for path in paths if not path.finished}
        if self.slots.in_step and len(going) > 1:
            raise RuntimeError("recurrent states are kept for all rows at once: rows go in step")
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
            self._move_left(min(self._padding))

    def take_back(self, num_slots: int) -> None:
        """Take the last pass's slots out of the cache again, because nothing will be committed.

        Then the cache of a single row holds the tokens up to the last commit, in their places.

        Args:
            num_slots: as for `commit`.
        """
        self.slots.take_back(num_slots)

    def _keep_states(self, paths: Sequence[Sequence[int]]) -> None:
        states = torch.cat(
            [self.hidden_states, self.new_states.to(self.hidden_states.device)], dim=1
        )
        known = self.hidden_states.shape[1]
        kept = min(self.num_states, known + min(len(path) for path in paths))
        slots = [[*range(known), *(known + node for node in path)][-kept:] for path in paths]
        if len(slots) == 1:
            self.hidden_states = states[:, slots[0]]
        else:
            self.hidden_states = states[torch.arange(len(slots))[:, None], torch.tensor(slots)]

    def _extend_model_kwargs(self, lengths: Sequence[int]) -> None:
        model_kwargs, longest = self.model_kwargs, max(lengths)
        position_ids, attention_mask = (
            model_kwargs.pop(name, None) for name in ("position_ids", "attention_mask")
        )
        if model_kwargs.get("token_type_ids") is not None:  # new tokens are of the last one's type
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

    def _move_left(self, num_slots: int) -> None:
        """Drop slots that have a meaning in no row."""
        if num_slots == 0 or not self.may_move:
            return
        self.slots.move_left(num_slots)
        self.input_ids = self.input_ids[:, num_slots:]
        # One token follows each state, the root at the latest; states of what is dropped go with it
        self.hidden_states = self.hidden_states[:, 1 - self.input_ids.shape[1] :]
        self.model_kwargs["attention_mask"] = self.model_kwargs["attention_mask"][:, num_slots:]
        self._padding = [padding - num_slots for padding in self._padding]

    def keep(self, kept: Sequence[int]) -> None:
        """Keep these rows only, by their place among the present ones."""
        index = torch.tensor(kept)
        self.slots.keep_rows(kept)
        self.numbers = [self.numbers[place] for place in kept]
        self._padding = [self._padding[place] for place in kept]
        self.input_ids = self.input_ids[index]
        self.hidden_states = self.hidden_states[index]
        for name, value in self.model_kwargs.items():
            if name == "position_ids" and value is not None:
                self.model_kwargs[name] = value[..., index, :]
            elif torch.is_tensor(value) and value.ndim > 1:
                self.model_kwargs[name] = value[index]
        self._move_left(min(self._padding))


def _append(columns: torch.Tensor, new: Sequence[Sequence[int]]) -> torch.Tensor:
    """Append to each row of `(A, L)` its new values, flush right; 0 comes in on the left."""
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
