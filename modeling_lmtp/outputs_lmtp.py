"""What a call returns: the emitted tokens, and the other fields in the layout of plain decoding.

Shapes: `B` rows of the call, `A` rows in a pass, `L` prompt length, `Q = 1 + N` nodes, `K` slots that a
layer attends to, `H` hidden size, `t` a step of plain decoding.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from .acceptance_lmtp import AcceptedPath
from .cache_lmtp import join_rows, move_left, num_slots_of, stop_rollback, take_row, window_of
from .drafting_lmtp import Candidates
from .rollback_lmtp import CacheSlots
from .transformers_lmtp import extend, next_inputs, with_cache

Layers = tuple[torch.Tensor, ...]
PLAIN = "plain"  # the source of a token that was not drafted


@dataclass
class LMTPGenerateOutput(GenerateDecoderOnlyOutput):
    """The output of `generate(use_lmtp=True, return_dict_in_generate=True)`.

    All fields of plain decoding have plain decoding's shapes. In finished rows, scores, logits and states
    are 0, where plain decoding computes some for the padding.

    Args:
        acceptance_lengths: for each row, the number of tokens that each backbone pass after the prefill
            emitted, the bonus token included; their mean is the tokens per step τ, 1 for plain decoding.
        num_candidates: for each row, the number of candidates that each of these passes verified.
        token_sources: for each row, what proposed each emitted token: `"head"`, `"lookup"`, `"drafter"` for
            a drafter that does not say, or `"plain"` for the prefill's token and the last of each pass.
    """

    acceptance_lengths: list[list[int]] | None = None
    num_candidates: list[list[int]] | None = None
    token_sources: list[list[str]] | None = None


def as_lmtp_output(
    output: ModelOutput, prompt_length: int, end_ids: Collection[int]
) -> LMTPGenerateOutput:
    """Return plain decoding's output with the other fields: every pass emitted one token.

    Args:
        output: of plain decoding.
        prompt_length: how many tokens of each sequence are the prompt.
        end_ids: the tokens that end a row.
    """
    num_passes = []
    for tokens in output.sequences[:, prompt_length:].tolist():
        ends = (index for index, token in enumerate(tokens) if token in end_ids)
        num_passes.append(next(ends, len(tokens) - 1))
    return LMTPGenerateOutput(
        **output,
        acceptance_lengths=[[1] * count for count in num_passes],
        num_candidates=[[0] * count for count in num_passes],
        token_sources=[[PLAIN] * (1 + count) for count in num_passes],
    )


class EmittedTokens:
    """The tokens that each row of a call has emitted.

    Args:
        prompts: `(B, L)`.
        pad_token_id: pads rows that finish before others.
        streamer: receives each token once, in order.

    Attributes:
        rows: the tokens after the prompt, per row.
        acceptance_lengths, num_candidates, token_sources: see `LMTPGenerateOutput`.
    """

    def __init__(
        self, prompts: torch.Tensor, pad_token_id: int, streamer: BaseStreamer | None = None
    ) -> None:
        self.prompts = prompts
        self.pad_token_id = pad_token_id
        self.streamer = streamer
        self.rows: list[list[int]] = [[] for _ in prompts]
        self.acceptance_lengths: list[list[int]] = [[] for _ in prompts]
        self.num_candidates: list[list[int]] = [[] for _ in prompts]
        self.token_sources: list[list[str]] = [[] for _ in prompts]
        self._num_streamed = 0

    def length(self, row: int) -> int:
        """Return the length of a row, prompt included."""
        return self.prompts.shape[1] + len(self.rows[row])

    def emit(
        self, rows: Sequence[int], paths: Sequence[AcceptedPath], candidates: Candidates
    ) -> None:
        """Append the tokens that these rows accepted of their candidates, and stream them."""
        for place, (row, path) in enumerate(zip(rows, paths, strict=True)):
            if self.rows[row]:
                self.acceptance_lengths[row].append(len(path.tokens))
                self.num_candidates[row].append(candidates.trees[place].num_nodes)
            sources = candidates.sources_of(place)
            self.token_sources[row] += [*(sources[node - 1] for node in path.nodes[1:]), PLAIN]
            self.rows[row] += path.tokens
        if self.streamer is not None:
            for tokens in self.steps(self._num_streamed):
                self.streamer.put(torch.tensor(tokens))
            self._num_streamed = max(map(len, self.rows))

    def steps(self, start: int = 0) -> list[list[int]]:
        """Return the tokens step by step from `start`, one per row, with padding in shorter rows."""
        rows = [tokens[start:] for tokens in self.rows]
        longest = max(map(len, rows))
        padded = [tokens + [self.pad_token_id] * (longest - len(tokens)) for tokens in rows]
        return [list(step) for step in zip(*padded, strict=True)]

    def sequences(self) -> torch.Tensor:
        """Return prompts and emitted tokens, `(B, L + …)`."""
        # int64, as in plain decoding, whatever the dtype of the prompts
        emitted = torch.tensor(self.steps(), dtype=torch.long).T
        return torch.cat([self.prompts, emitted.to(self.prompts.device)], dim=-1)


class StateRecords:
    """Hidden states, or attentions, of each emitted token, in the order of plain decoding.

    Args:
        num_rows: `B`.

    Attributes:
        prompt: what the prefill returned.
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
        select: Callable[[torch.Tensor, int, int, AcceptedPath, int], torch.Tensor],
    ) -> None:
        """Record the states of the accepted nodes; `select` picks one node from a layer's tensor."""
        for place, (row, path) in enumerate(zip(rows, paths, strict=True)):
            for depth in range(len(path.nodes)):
                self.by_row[row].append(
                    tuple(
                        select(states, layer, place, path, depth)
                        for layer, states in enumerate(layers)
                    )
                )

    def steps(self) -> tuple[Layers, ...]:
        """Return one tensor per layer for each step, over all rows; 0 in finished rows."""
        longest = max(self.by_row, key=len)
        assert self.prompt is not None
        steps = [self.prompt]
        for t, example in enumerate(longest):
            zeros = tuple(torch.zeros_like(states) for states in example)
            rows = [steps_[t] if t < len(steps_) else zeros for steps_ in self.by_row]
            steps.append(tuple(torch.cat(states) for states in zip(*rows, strict=True)))
        return tuple(steps)


class PassRecorder:
    """Records the hidden states and attentions of the emitted tokens, if the call asks for them.

    Args:
        emitted: the tokens so far.
        cache: tells each layer's window.
        hidden_states, attentions: whether to record them.
    """

    def __init__(
        self, emitted: EmittedTokens, cache: Cache, hidden_states: bool, attentions: bool
    ) -> None:
        self.emitted = emitted
        self.cache = cache
        num_rows = len(emitted.rows)
        self._hidden_states = StateRecords(num_rows) if hidden_states else None
        self._attentions = StateRecords(num_rows) if attentions else None

    def add_prompt(self, outputs: ModelOutput) -> None:
        """Record the prefill."""
        if self._hidden_states is not None:
            self._hidden_states.prompt = outputs.hidden_states
        if self._attentions is not None:
            self._attentions.prompt = outputs.attentions

    def add(self, outputs: ModelOutput, rows: Sequence[int], paths: Sequence[AcceptedPath]) -> None:
        """Record a verification pass, before its accepted tokens are emitted."""
        if self._hidden_states is not None:
            self._hidden_states.add(outputs.hidden_states, rows, paths, _state_at)
        if self._attentions is not None:
            lengths = {place: self.emitted.length(row) for place, row in enumerate(rows)}

            def attention_at(
                attention: torch.Tensor, layer: int, place: int, path: AcceptedPath, depth: int
            ) -> torch.Tensor:
                length = lengths[place] + depth
                window = window_of(self.cache, layer) or length
                return _attention_at(attention, place, path, depth, min(length, window))

            self._attentions.add(outputs.attentions, rows, paths, attention_at)

    @property
    def hidden_states(self) -> tuple[Layers, ...] | None:
        """Per step, a tensor per layer: `(B, L, H)` for the prompts, then `(B, 1, H)`."""
        return None if self._hidden_states is None else self._hidden_states.steps()

    @property
    def attentions(self) -> tuple[Layers, ...] | None:
        """Per step, a tensor per layer: `(B, heads, L, L)`, then `(B, heads, 1, L + t)`."""
        return None if self._attentions is None else self._attentions.steps()


def _state_at(
    states: torch.Tensor, _layer: int, place: int, path: AcceptedPath, depth: int
) -> torch.Tensor:
    return states[place : place + 1, path.nodes[depth], None]


def _attention_at(
    attention: torch.Tensor, place: int, path: AcceptedPath, depth: int, length: int
) -> torch.Tensor:
    """Select a node's attention `(1, heads, 1, length)` to its own path from `(A, heads, Q, K)`."""
    at_node = attention[place : place + 1, :, path.nodes[depth], None]
    prefix = attention.shape[-1] - attention.shape[-2]
    slots = [prefix + node for node in path.nodes[: depth + 1]]
    on_path = torch.cat([at_node[..., :prefix], at_node[..., slots]], dim=-1)
    missing = length - on_path.shape[-1]
    return pad(on_path, (missing, 0)) if missing > 0 else on_path[..., -missing:]


class CacheRestorer:
    """Restores a batch's cache to what plain decoding leaves, though rows finish at different times.

    Args:
        backbone: the model.
        slots: of the call's cache, which holds all rows again in the end.
        model_kwargs: what `generate` keeps between steps, for the prompts.
        emitted: the tokens of the call.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        slots: CacheSlots,
        model_kwargs: dict[str, Any],
        emitted: EmittedTokens,
    ) -> None:
        self.backbone = backbone
        self.slots = slots
        self.model_kwargs = dict(model_kwargs)
        self.emitted = emitted
        self.rows: dict[int, tuple[Cache, int]] = {}  # with the number of slots that each has used

    def save_rows(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Copy finished rows out of the cache, before it drops them.

        Args:
            places: where the rows are in the cache.
            rows: their indices in the call's batch.
        """
        for place, row in zip(places, rows, strict=True):
            cache, num_slots = take_row(self.slots.cache, place), self.slots.num_slots
            if not self.slots.in_lockstep:  # rows in lockstep are never moved, but may lack tokens
                # The last token is not cached yet. The row moves back to where the prompt put it
                num_slots = self.slots.num_prompt_slots + len(self.emitted.rows[row]) - 1
                move_left(cache, num_slots_of(cache) - num_slots)
            self.rows[row] = cache, num_slots

    def restore(self) -> None:
        """Run the tokens that shorter rows lack, their last one and padding, and join all rows."""
        sequences, num_new = self.emitted.sequences(), len(self.emitted.steps())
        full = self.slots.num_prompt_slots + num_new - 1
        for row, (cache, num_slots) in self.rows.items():
            stop_rollback(cache)
            if full > num_slots:
                self._run(cache, row, sequences[row : row + 1, :-1], full - num_slots, num_new)
        join_rows(self.slots.cache, [self.rows[row][0] for row in range(len(sequences))])

    def _run(
        self, cache: Cache, row: int, tokens: torch.Tensor, num_missing: int, num_new: int
    ) -> None:
        model_kwargs = with_cache(self.model_kwargs, cache)
        for name, value in model_kwargs.items():
            if name == "position_ids" and value is not None:
                model_kwargs[name] = value[..., min(row, value.shape[-2] - 1), None, :]
            elif torch.is_tensor(value) and value.ndim > 1:
                model_kwargs[name] = value[row : row + 1]
        model_kwargs = extend(model_kwargs, num_new - 1)
        inputs = next_inputs(self.backbone, tokens, num_missing, model_kwargs)
        self.backbone(**inputs, return_dict=True)
