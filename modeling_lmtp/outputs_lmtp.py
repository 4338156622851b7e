"""What a call returns beside its tokens, laid out as plain decoding lays it out.

Shapes: `B` rows of the call, `A` rows in a pass, `L` prompt length, `Q = 1 + N` nodes, `K` slots
that a layer attends to, `H` hidden size, `t` a step of plain decoding.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .acceptance_lmtp import AcceptedPath
from .cache_lmtp import join_rows, move_left, num_slots_of, stop_rollback, take_row, window_of
from .rollback_lmtp import CacheSlots
from .texts_lmtp import Texts
from .transformers_lmtp import extend, next_inputs, with_cache

Layers = tuple[torch.Tensor, ...]


@dataclass
class LMTPGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate(use_lmtp=True, return_dict_in_generate=True)` returns.

    All of plain decoding's fields have plain decoding's shapes. In rows that have ended, scores,
    logits and states are 0 (plain decoding computes some for the padding).

    Args:
        acceptance_lengths: for each row, the tokens emitted by each backbone pass after the prefill,
            the bonus token included; their mean is the tokens per step τ, 1 for plain decoding.
    """

    acceptance_lengths: list[list[int]] | None = None


def with_acceptance_lengths(
    output: ModelOutput, prompt_length: int, end_ids: Collection[int]
) -> LMTPGenerateOutput:
    """Add to plain decoding's output that every pass gave one token.

    Args:
        output: of plain decoding.
        prompt_length: how many tokens each sequence begins with.
        end_ids: the tokens at which a row ends.
    """
    lengths = []
    for tokens in output.sequences[:, prompt_length:].tolist():
        ends = (place for place, token in enumerate(tokens) if token in end_ids)
        lengths.append([1] * next(ends, len(tokens) - 1))
    return LMTPGenerateOutput(**output, acceptance_lengths=lengths)


class StateRecords:
    """Hidden states, or attentions, of each emitted token, in the order of plain decoding.

    Args:
        num_rows: `B`.

    Attributes:
        prompt: what the pass over the prompts returned.
        by_row: for each row and step, one tensor per layer.
    """

    def __init__(self, num_rows: int) -> None:
        self.prompt: Layers | None = None
        self.by_row: list[list[Layers]] = [[] for _ in range(num_rows)]

    def add(
        self,
        layers: Layers,
        rows: Sequence[int],
        paths: Sequence[AcceptedPath],
        cut: Callable[[torch.Tensor, int, int, AcceptedPath, int], torch.Tensor],
    ) -> None:
        """Record the states of the accepted nodes; `cut` selects one node from a layer's tensor."""
        for place, (row, path) in enumerate(zip(rows, paths, strict=True)):
            for depth in range(len(path.nodes)):
                self.by_row[row].append(
                    tuple(
                        cut(states, number, place, path, depth)
                        for number, states in enumerate(layers)
                    )
                )

    def steps(self) -> tuple[Layers, ...]:
        """Return for each step one tensor per layer, over all rows; 0 in those that have ended."""
        longest = max(self.by_row, key=len)
        assert self.prompt is not None
        steps = [self.prompt]
        for t, example in enumerate(longest):
            of_rows = [
                own[t] if t < len(own) else tuple(torch.zeros_like(states) for states in example)
                for own in self.by_row
            ]
            steps.append(tuple(torch.cat(states) for states in zip(*of_rows, strict=True)))
        return tuple(steps)


class PassRecorder:
    """Keeps hidden states and attentions of the tokens emitted, if the call asks for them.

    Args:
        texts: what has been emitted.
        cache: tells each layer's window.
        hidden_states, attentions: keep them.
    """

    def __init__(self, texts: Texts, cache: Cache, hidden_states: bool, attentions: bool) -> None:
        self.texts = texts
        self.cache = cache
        num_rows = len(texts.emitted)
        self._hidden_states = StateRecords(num_rows) if hidden_states else None
        self._attentions = StateRecords(num_rows) if attentions else None

    def add_prompt(self, outputs: ModelOutput) -> None:
        """Take up the pass over the prompts."""
        if self._hidden_states is not None:
            self._hidden_states.prompt = outputs.hidden_states
        if self._attentions is not None:
            self._attentions.prompt = outputs.attentions

    def add(self, outputs: ModelOutput, rows: Sequence[int], paths: Sequence[AcceptedPath]) -> None:
        """Record a verification pass, before its accepted tokens are emitted."""
        if self._hidden_states is not None:
            self._hidden_states.add(outputs.hidden_states, rows, paths, _state_at)
        if self._attentions is not None:
            lengths = {place: self.texts.length(row) for place, row in enumerate(rows)}

            def attention_at(
                attention: torch.Tensor, layer: int, place: int, path: AcceptedPath, depth: int
            ) -> torch.Tensor:
                length = lengths[place] + depth
                window = window_of(self.cache, layer) or length
                return _attention_at(attention, place, path, depth, min(length, window))

            self._attentions.add(outputs.attentions, rows, paths, attention_at)

    @property
    def hidden_states(self) -> tuple[Layers, ...] | None:
        """Step by step, a tensor per layer: `(B, L, H)` of the prompts, then each `(B, 1, H)`."""
        return None if self._hidden_states is None else self._hidden_states.steps()

    @property
    def attentions(self) -> tuple[Layers, ...] | None:
        """Step by step, a tensor per layer: `(B, heads, L, L)`, then each `(B, heads, 1, L + t)`."""
        return None if self._attentions is None else self._attentions.steps()


def _state_at(
    states: torch.Tensor, _layer: int, place: int, path: AcceptedPath, depth: int
) -> torch.Tensor:
    return states[place : place + 1, path.nodes[depth], None]


def _attention_at(
    attention: torch.Tensor, place: int, path: AcceptedPath, depth: int, length: int
) -> torch.Tensor:
    """Pick a node's attention from `(A, heads, Q, K)`, over its own path only: `(1, heads, 1, length)`."""
    own = attention[place : place + 1, :, path.nodes[depth], None]
    prefix = attention.shape[-1] - attention.shape[-2]
    slots = [prefix + node for node in path.nodes[: depth + 1]]
    own = torch.cat([own[..., :prefix], own[..., slots]], dim=-1)
    missing = length - own.shape[-1]
    return pad(own, (missing, 0)) if missing > 0 else own[..., -missing:]


class ReturnedCache:
    """Puts a batch's cache together again, as plain decoding leaves it: rows end at different times.

    Args:
        backbone: the model.
        slots: keeps the call's cache, which in the end holds all rows.
        model_kwargs: what `generate` keeps, for the prompts.
        texts: what has been emitted.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        slots: CacheSlots,
        model_kwargs: dict[str, Any],
        texts: Texts,
    ) -> None:
        self.backbone = backbone
        self.slots = slots
        self.model_kwargs = dict(model_kwargs)
        self.texts = texts
        self.rows: dict[int, tuple[Cache, int]] = {}  # and how many slots each has used

    def take(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Take rows that have ended out of the cache, as long as it holds them.

        Args:
            places: where the rows stand among those still in the cache.
            rows: their numbers among those of the call.
        """
        for place, row in zip(places, rows, strict=True):
            taken, num_slots = take_row(self.slots.cache, place), self.slots.num_slots
            if not self.slots.in_step:  # rows in step are never moved, but may lack tokens
                # The last token is not in it yet; the slots on the left become as the prompt had them
                num_slots = self.slots.num_prompt_slots + len(self.texts.emitted[row]) - 1
                move_left(taken, num_slots_of(taken) - num_slots)
            self.rows[row] = taken, num_slots

    def put_together(self) -> None:
        """Run what rows that ended early lack, their last token and padding, and join all rows."""
        sequences = self.texts.sequences()
        full = self.slots.num_prompt_slots + len(self.texts.padded()) - 1
        for row, (taken, num_slots) in self.rows.items():
            stop_rollback(taken)
            if full > num_slots:
                self._run(taken, row, sequences[row : row + 1, :-1], full - num_slots)
        join_rows(self.slots.cache, [self.rows[row][0] for row in range(len(sequences))])

    def _run(self, cache: Cache, row: int, tokens: torch.Tensor, missing: int) -> None:
        model_kwargs = with_cache(self.model_kwargs, cache)
        for name, value in model_kwargs.items():
            if name == "position_ids" and value is not None:
                model_kwargs[name] = value[..., min(row, value.shape[-2] - 1), None, :]
            elif torch.is_tensor(value) and value.ndim > 1:
                model_kwargs[name] = value[row : row + 1]
        model_kwargs = extend(model_kwargs, len(self.texts.padded()) - 1)
        inputs = next_inputs(self.backbone, tokens, missing, model_kwargs)
        self.backbone(**inputs, return_dict=True)
