"""Verification over a static cache: all passes after the prefill have the same shapes.

Drafts are filled up to `N` nodes that are never accepted, rows that have ended go on unheeded, and masks
reach over the whole cache, so that the pass can be compiled, or captured as a CUDA graph.

Shapes: `B` rows of the call, `A` of them still generating, `C` slots of the cache, `Q = 1 + N` nodes of
every pass, `N` the most candidates that are ever drafted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .drafting_lmtp import Candidates
from .rollback_lmtp import CacheSlots
from .static_lmtp import StaticSlots
from .texts_lmtp import Texts
from .transformers_lmtp import cache_of, extend, next_inputs
from .tree_lmtp import DraftTree
from .verification_lmtp import RunPass, Verification, Verifier


class StaticVerifier(Verifier):
    """Verifies drafts over a static cache; each pass has `B` rows of `Q` nodes.

    Args:
        backbone: takes trees.
        max_nodes: `N`.
        run: see `Verifier`; may be compiled.
    """

    def __init__(
        self, backbone: PreTrainedModel, max_nodes: int, run: RunPass | None = None
    ) -> None:
        super().__init__(backbone, run=run)
        self.num_nodes = 1 + max_nodes

    def slots(self, model_kwargs: dict[str, Any], num_rows: int, num_tokens: int) -> CacheSlots:
        """Return where the rows lie, and verify there from now on."""
        mask = model_kwargs.get("attention_mask")
        self.rows_in_cache = StaticSlots(cache_of(model_kwargs), num_rows, self.num_nodes, mask)
        return self.rows_in_cache

    def verify(
        self,
        input_ids: torch.Tensor,
        candidates: Candidates,
        model_kwargs: dict[str, Any],
        num_replayed: int = 0,
    ) -> Verification:
        """Run the backbone on `Q` nodes per row: the root, the candidates, and what fills them up.

        Args:
            input_ids: `(A, L)`, the roots last.
            candidates: for each row, at most `N`.
            model_kwargs: what `generate` keeps between steps; not changed.
            num_replayed: 0, as nothing lacks in a static cache.

        Returns:
            Output and states of the `A` rows.

        Raises:
            ValueError: there are more candidates than the drafter said there would be.
        """
        if candidates.num_nodes >= self.num_nodes:
            raise ValueError(
                f"The drafter proposed {candidates.num_nodes} candidates, but its max_nodes is "
                f"{self.num_nodes - 1}, and a pass over a static cache has room for no more."
            )
        all_candidates = self._fill_up(candidates)
        roots = self.rows_in_cache.among_all(input_ids[:, -1:])
        nodes = torch.cat([roots, all_candidates.token_ids], dim=-1)
        depths, visible = self._arrangement(all_candidates, nodes.device)
        # A mask in the place of ours, so that no other is made
        kept = {**self._of_all_rows(model_kwargs, depths), "attention_mask": visible[:, None]}
        inputs = next_inputs(self.backbone, nodes, self.num_nodes, kept)
        inputs["attention_mask"] = self._masks.over_all_slots(
            self.rows_in_cache.seen(visible), self.rows_in_cache.cache
        )
        outputs, states = self._run(inputs)
        of_rows = self.rows_in_cache.of_rows
        outputs.logits = of_rows(outputs.logits)
        if outputs.get("hidden_states") is not None:
            outputs.hidden_states = tuple(map(of_rows, outputs.hidden_states))
        return Verification(outputs, None if states is None else of_rows(states))

    def _fill_up(self, candidates: Candidates) -> Candidates:
        """Make drafts for all `B` rows of what `A` rows have, `N` tokens each."""
        trees = [DraftTree()] * len(self.rows_in_cache.lengths)
        for place, tree in zip(self.rows_in_cache.places, candidates.trees, strict=True):
            trees[place] = tree
        missing = self.num_nodes - 1 - candidates.num_nodes
        token_ids = self.rows_in_cache.among_all(pad(candidates.token_ids, (0, missing)))
        return Candidates(tuple(trees), token_ids)

    def _of_all_rows(self, model_kwargs: dict[str, Any], depths: torch.Tensor) -> dict[str, Any]:
        """Return what `generate` keeps, with a value for each of the nodes `(B, Q)`."""
        kept = {}
        for name, value in model_kwargs.items():
            if name == "position_ids" and value is not None:
                kept[name] = self.rows_in_cache.among_all(value, dim=-2) + depths
            elif name.endswith("token_type_ids") and value is not None:  # new ones are as the last
                kept[name] = self.rows_in_cache.among_all(value[:, -1:]).expand(-1, self.num_nodes)
            elif torch.is_tensor(value) and value.ndim > 1:
                kept[name] = self.rows_in_cache.among_all(value)
            else:
                kept[name] = value
        return kept


class ReturnedStaticCache:
    """Gives rows of a batch that ended early what plain decoding has behind them: an end and padding.

    Args:
        backbone: the model.
        slots: where the rows lie.
        model_kwargs: what `generate` keeps, for the prompts.
        texts: what has been emitted.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        slots: StaticSlots,
        model_kwargs: dict[str, Any],
        texts: Texts,
    ) -> None:
        self.backbone = backbone
        self.slots = slots
        self.model_kwargs = dict(model_kwargs)
        self.texts = texts

    def take(self, places: Sequence[int], rows: Sequence[int]) -> None:
        """Leave rows that have ended where they are."""

    def put_together(self) -> None:
        """Run the tokens that the shortest row lacks, in all rows."""
        num_new, shortest = len(self.texts.padded()) - 1, min(self.slots.lengths)
        missing = self.slots.num_prompt_slots + num_new - shortest
        self.slots.forget_after(shortest)
        if missing == 0:
            return
        model_kwargs = extend(self.model_kwargs, num_new)
        tokens = self.texts.sequences()[:, :-1]
        inputs = next_inputs(self.backbone, tokens, missing, model_kwargs)
        self.backbone(**inputs, return_dict=True)
