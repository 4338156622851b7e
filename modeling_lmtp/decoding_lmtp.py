"""The decoding loop: prefill, then draft, verify, accept, commit, until every row has ended.

The text is plain decoding's: each token is selected as plain decoding would select it, and a row accepts
candidates for as long as they propose these tokens (see *Exactness* in the README).

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
from .outputs_lmtp import LMTPGenerateOutput, PassRecorder, ReturnedCache
from .rollback_lmtp import CacheSlots
from .rows_lmtp import Rows
from .static_lmtp import StaticSlots
from .static_verification_lmtp import ReturnedStaticCache
from .texts_lmtp import Texts
from .transformers_lmtp import cache_of, decode_context, output_with_cache, prefill
from .verification_lmtp import Verifier


@dataclass
class Decoder:
    """Generates from a batch of prompts.

    Args:
        verifier: holds the backbone.
        collect_states: collects the states that the drafter reads, in the passes over the prompts.
        drafter: proposes candidates; whatever it proposes, the text stays the same.
        acceptor: selects the tokens of plain decoding.
        texts: collects them.
        generation_config: as `generate` prepared it.
        max_length: bounds the drafts, but not the text.
        returns_cache: whether the caller gets to see the cache.
        may_move: whether slots without meaning may be dropped, see `Support.ragged`.
    """

    verifier: Verifier
    collect_states: Callable[[], AbstractContextManager[list[torch.Tensor]]]
    drafter: Drafter
    acceptor: Acceptor
    texts: Texts
    generation_config: GenerationConfig
    max_length: int
    returns_cache: bool
    may_move: bool

    def decode(self, model_kwargs: dict[str, Any]) -> LMTPGenerateOutput:
        """Generate; whatever ends the call, the cache goes back as one that only grows.

        Args:
            model_kwargs: as `generate` prepared them, the cache among them.
        """
        self.drafter.reset()
        try:
            return self._decode(model_kwargs)
        finally:
            stop_rollback(cache_of(model_kwargs))

    def _decode(self, model_kwargs: dict[str, Any]) -> LMTPGenerateOutput:
        cache = cache_of(model_kwargs)
        recorder = PassRecorder(self.texts, cache, *self._recorded())
        with self.collect_states() as states:  # of several passes, if the prefill is chunked
            outputs = self._prefill(model_kwargs)
        recorder.add_prompt(outputs)
        prompts = self.texts.prompts
        slots = self.verifier.slots(model_kwargs, *prompts.shape)
        returned = self._returned_cache(slots, model_kwargs)
        num_states = self.drafter.num_states
        prompt_states = torch.cat(states, dim=1)
        rows = Rows(prompts, prompt_states, num_states, model_kwargs, slots, self.may_move)
        with decode_context(self.verifier.backbone):
            self._loop(rows, outputs.logits[:, -1:], recorder, returned)
        if returned is not None:
            returned.put_together()
        if self.texts.streamer is not None:
            self.texts.streamer.end()
        return output_with_cache(
            LMTPGenerateOutput,
            cache,
            sequences=self.texts.sequences(),
            scores=self.acceptor.recorded.scores,
            logits=self.acceptor.recorded.logits,
            attentions=recorder.attentions,
            hidden_states=recorder.hidden_states,
            acceptance_lengths=self.texts.acceptance_lengths,
        )

    def _recorded(self) -> tuple[bool, bool]:
        config = self.generation_config
        returns_dict = bool(config.return_dict_in_generate)
        return (
            returns_dict and config.output_hidden_states,
            returns_dict and config.output_attentions,
        )

    def _prefill(self, model_kwargs: dict[str, Any]) -> ModelOutput:
        """Run the prompts; the last of the logits are those after the last token.

        The drafter's states are those that the unembedding reads, so it must read as many.
        """
        if "logits_to_keep" in model_kwargs:
            model_kwargs["logits_to_keep"] = self.drafter.num_states
        return prefill(
            self.verifier.backbone, self.texts.prompts, self.generation_config, model_kwargs
        )

    def _returned_cache(
        self, slots: CacheSlots, model_kwargs: dict[str, Any]
    ) -> ReturnedCache | ReturnedStaticCache | None:
        """A single row's slots are as plain decoding leaves them; anything else needs putting together."""
        is_simple = len(self.texts.emitted) == 1 and not slots.in_step
        if is_simple or not self.returns_cache:
            return None
        if isinstance(slots, StaticSlots):
            return ReturnedStaticCache(self.verifier.backbone, slots, model_kwargs, self.texts)
        return ReturnedCache(self.verifier.backbone, slots, model_kwargs, self.texts)

    def _loop(
        self,
        rows: Rows,
        logits: torch.Tensor,
        recorder: PassRecorder,
        returned: ReturnedCache | ReturnedStaticCache | None,
    ) -> None:
        """Emit the tokens that follow from the prompts' logits `(B, 1, V)`, then all others."""
        candidates = Candidates.none(rows.input_ids)
        outputs = None
        while True:
            try:
                paths = self.acceptor.accept(candidates, logits, rows.numbers)
                if outputs is not None:
                    recorder.add(outputs, rows.numbers, paths)
                self.texts.emit(rows.numbers, paths)
            except BaseException:  # a streamer cancels, say; the caller may go on from the cache
                if outputs is not None:
                    rows.take_back(1 + candidates.num_nodes)
                raise
            rows.commit(paths, 1 + candidates.num_nodes)
            if not self._drop_finished(rows, paths, returned):
                return
            candidates = self._draft(rows)
            outputs, rows.new_states = self.verifier.verify(
                rows.input_ids, candidates, rows.model_kwargs, rows.slots.num_replayed
            )
            logits = outputs.logits

    def _drop_finished(
        self,
        rows: Rows,
        paths: Sequence[AcceptedPath],
        returned: ReturnedCache | ReturnedStaticCache | None,
    ) -> bool:
        """Take rows that have ended out of the batch; return whether any is left."""
        ended = [place for place, path in enumerate(paths) if path.finished]
        if returned is not None:
            returned.take(ended, [rows.numbers[place] for place in ended])
        if ended and len(ended) < len(paths):
            rows.keep([place for place in range(len(paths)) if place not in ended])
        return len(ended) < len(paths)

    def _draft(self, rows: Rows) -> Candidates:
        """Draft no deeper than tokens may follow: candidates, and one more after them."""
        if rows.slots.must_settle:
            return Candidates.none(rows.input_ids)
        rooms = [max(0, self.max_length - self.texts.length(row) - 1) for row in rows.numbers]
        device = rows.hidden_states.device  # the heads'; tokens may be elsewhere
        candidates = self.drafter.draft(rows.input_ids.to(device), rows.hidden_states, max(rooms))
        return candidates.truncate(rooms).to(rows.input_ids.device)
