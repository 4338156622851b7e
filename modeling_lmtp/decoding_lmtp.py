"""The decoding loop: prefill, then draft, verify, accept, commit, until every row has finished.

The text is that of plain decoding: each token is selected as plain decoding would select it, and a row
accepts candidates for as long as they propose these tokens (see *Exactness* in the README).

Shapes: `B` rows, `L` prompt length, `S` states, `H` hidden size, `V` vocabulary size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .acceptance_lmtp import AcceptedPath, Acceptor
from .cache_lmtp import stop_rollback
from .drafting_lmtp import Candidates, Drafter
from .outputs_lmtp import CacheRestorer, EmittedTokens, LMTPGenerateOutput, PassRecorder
from .rollback_lmtp import CacheSlots
from .rows_lmtp import Rows
from .static_lmtp import StaticCacheRestorer, StaticSlots
from .transformers_lmtp import cache_of, decode_context, output_with_cache, prefill
from .verification_lmtp import Verifier

Restorer = CacheRestorer | StaticCacheRestorer


@dataclass
class Decoder:
    """Generates from a batch of prompts.

    Args:
        verifier: holds the backbone.
        collect_states: collects the states of the prompts' tokens for the drafter.
        drafter: proposes candidates; they do not change the text.
        acceptor: selects the tokens of plain decoding.
        emitted: the tokens so far.
        generation_config: as `generate` prepared it.
        max_length: bounds the drafts, but not the text.
        returns_cache: whether the caller gets to see the cache.
        can_drop_padding: see `Rows`.
    """

    verifier: Verifier
    collect_states: Callable[[], AbstractContextManager[list[torch.Tensor]]]
    drafter: Drafter
    acceptor: Acceptor
    emitted: EmittedTokens
    generation_config: GenerationConfig
    max_length: int
    returns_cache: bool
    can_drop_padding: bool

    def decode(self, model_kwargs: dict[str, Any]) -> LMTPGenerateOutput:
        """Generate. However the call ends, the caller's cache becomes an ordinary one again.

        Args:
            model_kwargs: as `generate` prepared them, with the cache.
        """
        self.drafter.reset()
        try:
            return self._decode(model_kwargs)
        finally:
            stop_rollback(cache_of(model_kwargs))

    def _decode(self, model_kwargs: dict[str, Any]) -> LMTPGenerateOutput:
        cache, prompts = cache_of(model_kwargs), self.emitted.prompts
        recorder = PassRecorder(self.emitted, cache, *self._recorded_fields())
        with self.collect_states() as states:  # of several passes, if the prefill is chunked
            outputs = self._prefill(model_kwargs)
        recorder.add_prompt(outputs)
        slots = self.verifier.slots(model_kwargs, *prompts.shape)
        restorer = self._restorer(slots, model_kwargs)
        rows = Rows(
            prompts,
            torch.cat(states, dim=1),
            self.drafter.num_states,
            model_kwargs,
            slots,
            self.can_drop_padding,
        )
        with decode_context(self.verifier.backbone):
            self._loop(rows, outputs.logits[:, -1:], recorder, restorer)
        if restorer is not None:
            restorer.restore()
        if self.emitted.streamer is not None:
            self.emitted.streamer.end()
        scores, logits = self.acceptor.recorded
        return output_with_cache(
            LMTPGenerateOutput,
            cache,
            sequences=self.emitted.sequences(),
            scores=scores,
            logits=logits,
            attentions=recorder.attentions,
            hidden_states=recorder.hidden_states,
            acceptance_lengths=self.emitted.acceptance_lengths,
            num_candidates=self.emitted.num_candidates,
            token_sources=self.emitted.token_sources,
        )

    def _recorded_fields(self) -> tuple[bool, bool]:
        config = self.generation_config
        returns_dict = bool(config.return_dict_in_generate)
        return (
            returns_dict and config.output_hidden_states,
            returns_dict and config.output_attentions,
        )

    def _prefill(self, model_kwargs: dict[str, Any]) -> ModelOutput:
        """Run the prompts; the last logits are those after the last token."""
        if "logits_to_keep" in model_kwargs:
            # The states are the unembedding's input, so it must read as many as the drafter needs
            model_kwargs["logits_to_keep"] = self.drafter.num_states
        return prefill(
            self.verifier.backbone, self.emitted.prompts, self.generation_config, model_kwargs
        )

    def _restorer(self, slots: CacheSlots, model_kwargs: dict[str, Any]) -> Restorer | None:
        # A single row's cache is already as plain decoding leaves it, unless it lacks replayed tokens
        is_restored = len(self.emitted.rows) == 1 and not slots.in_lockstep
        if is_restored or not self.returns_cache:
            return None
        if isinstance(slots, StaticSlots):
            return StaticCacheRestorer(self.verifier.backbone, slots, model_kwargs, self.emitted)
        return CacheRestorer(self.verifier.backbone, slots, model_kwargs, self.emitted)

    def _loop(
        self,
        rows: Rows,
        logits: torch.Tensor,
        recorder: PassRecorder,
        restorer: Restorer | None,
    ) -> None:
        """Emit the tokens that follow from the prompts' logits `(B, 1, V)`, then all others."""
        candidates = Candidates.none(rows.input_ids)
        outputs = None
        while True:
            try:
                paths = self.acceptor.accept(candidates, logits, rows.indices)
                self.drafter.observe([path.tokens for path in paths])
                if outputs is not None:
                    recorder.add(outputs, rows.indices, paths)
                self.emitted.emit(rows.indices, paths, candidates)
            except BaseException:  # a streamer may cancel, and the caller continue from the cache
                if outputs is not None:
                    rows.undo_pass(1 + candidates.num_nodes)
                raise
            rows.commit(paths, 1 + candidates.num_nodes)
            if not self._drop_finished(rows, paths, restorer):
                return
            candidates = self._draft(rows)
            outputs, states = self.verifier.verify(
                rows.input_ids, candidates, rows.model_kwargs, rows.slots.num_replayed
            )
            assert states is not None  # `plan` has given the verifier a pass that collects them
            rows.new_states = states
            logits = outputs.logits

    def _drop_finished(
        self, rows: Rows, paths: Sequence[AcceptedPath], restorer: Restorer | None
    ) -> bool:
        """Remove finished rows from the batch; return whether any row is left."""
        finished = [place for place, path in enumerate(paths) if path.finished]
        if restorer is not None:
            restorer.save_rows(finished, [rows.indices[place] for place in finished])
        if finished and len(finished) < len(paths):
            rows.keep([place for place in range(len(paths)) if place not in finished])
        return len(finished) < len(paths)

    def _draft(self, rows: Rows) -> Candidates:
        """Draft no deeper than there is room for, with the bonus token after the candidates."""
        if rows.slots.needs_plain_pass:
            return Candidates.none(rows.input_ids)
        rooms = [max(0, self.max_length - self.emitted.length(row) - 1) for row in rows.indices]
        device = rows.hidden_states.device  # the heads'; tokens may be on another
        candidates = self.drafter.draft(rows.input_ids.to(device), rows.hidden_states, max(rooms))
        return candidates.truncate(rooms).to(rows.input_ids.device)
