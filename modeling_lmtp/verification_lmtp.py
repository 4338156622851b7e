"""Verification: one backbone pass over the root and all candidates of each row's draft tree.

Shapes: `B` batch, `L` known tokens, root included, `Q = 1 + N` nodes, `V` vocabulary size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .drafting_lmtp import Candidates
from .masks_lmtp import TreeMasks
from .rollback_lmtp import CacheSlots, slots_of
from .transformers_lmtp import cache_of, extend, next_inputs
from .tree_lmtp import DraftTree

RunPass = Callable[[dict[str, Any]], tuple[ModelOutput, torch.Tensor | None]]


class Verification(NamedTuple):
    """What a verification pass returned.

    Args:
        outputs: the backbone's output for the nodes, logits `(B, Q, V)`.
        states: the leap heads' input at the nodes, `(B, Q, H)`; None if nothing collects it.
    """

    outputs: ModelOutput
    states: torch.Tensor | None


class _Arrangement(NamedTuple):
    """What depends on the trees alone."""

    depths: torch.Tensor  # (B, Q); behind a smaller tree, the depth of its deepest node again
    visible: torch.Tensor  # (B, Q, Q)


class Verifier:
    """Verifies drafts with one backbone; keeps what a tree needs from one step to the next.

    Args:
        backbone: the model.
        takes_trees: whether it verifies trees exactly, see `support_lmtp`.
        run: runs the backbone on prepared inputs; returns its output and the leap heads' input `(B, Q, H)`.
            By default the backbone runs and no states are collected.
    """

    def __init__(
        self, backbone: PreTrainedModel, takes_trees: bool = True, run: RunPass | None = None
    ) -> None:
        self.backbone = backbone
        self.takes_trees = takes_trees
        self._run = run or self._run_without_states
        self._masks = TreeMasks(backbone)
        self._kept: tuple[tuple[DraftTree, ...], _Arrangement] | None = None

    def slots(self, model_kwargs: dict[str, Any], num_rows: int, num_tokens: int) -> CacheSlots:
        """Return what keeps the cache of a batch whose prompts, `num_tokens` long, have been run."""
        return slots_of(cache_of(model_kwargs), num_tokens)

    def _run_without_states(self, inputs: dict[str, Any]) -> tuple[ModelOutput, None]:
        return self.backbone(**inputs, return_dict=True), None

    def verify(
        self,
        input_ids: torch.Tensor,
        candidates: Candidates,
        model_kwargs: dict[str, Any],
        num_replayed: int = 0,
    ) -> Verification:
        """Run the backbone on the roots and the candidates, appending `Q` slots to the cache.

        A chain is an ordinary continuation. In a tree each node sees the cached tokens and its own
        ancestors, and has the position of its depth.

        Args:
            input_ids: `(B, L)`, the roots last.
            candidates: for each row.
            model_kwargs: what `generate` keeps between steps, for the `L` known tokens; not changed.
            num_replayed: known tokens before the roots that the cache lacks; they are run as well.

        Raises:
            ValueError: a tree that is not a chain, for a backbone that does not take trees.
        """
        if not (self.takes_trees or candidates.is_chain):
            paths = next(tree.paths for tree in candidates.trees if not tree.is_chain)
            raise ValueError(
                f"{type(self.backbone).__name__} cannot verify a draft tree exactly, only a chain; "
                f"the drafter proposed the paths {paths}."
            )
        model_kwargs = extend(model_kwargs, candidates.num_nodes)
        if num_replayed and model_kwargs.get("position_ids") is not None:
            positions = model_kwargs["position_ids"]
            earlier = torch.arange(-num_replayed, 0, device=positions.device) + positions[..., :1]
            model_kwargs["position_ids"] = torch.cat([earlier, positions], dim=-1)
        tokens = torch.cat([input_ids, candidates.token_ids], dim=-1)
        num_tokens = num_replayed + 1 + candidates.num_nodes
        inputs = next_inputs(self.backbone, tokens, num_tokens, model_kwargs)
        self._arrange(inputs, candidates, model_kwargs)
        outputs, states = self._run(inputs)
        if num_replayed == 0:
            return Verification(outputs, states)
        return Verification(
            _drop_replayed(outputs, num_replayed),
            None if states is None else states[:, num_replayed:],
        )

    def _arrange(
        self, inputs: dict[str, Any], candidates: Candidates, model_kwargs: dict[str, Any]
    ) -> None:
        """Give the nodes the positions of their depths, and in a tree show them their ancestors only."""
        if candidates.is_chain and candidates.is_shared:
            return
        depths, visible = self._arrangement(candidates, inputs["input_ids"].device)
        if inputs.get("position_ids") is not None:
            known = inputs["position_ids"][..., : -candidates.num_nodes]  # up to the root
            inputs["position_ids"] = torch.cat([known[..., :-1], known[..., -1:] + depths], dim=-1)
        if not candidates.is_chain:
            cache = cache_of(model_kwargs)
            attention_mask = model_kwargs.get("attention_mask")
            inputs["attention_mask"] = self._masks(visible, depths, cache, attention_mask)

    def _arrangement(self, candidates: Candidates, device: torch.device) -> _Arrangement:
        if self._kept is None or self._kept[0] != candidates.trees:
            size = 1 + candidates.num_nodes
            depths = [
                tree.depths + tree.depths[-1:] * (size - 1 - tree.num_nodes)
                for tree in candidates.trees
            ]
            arrangement = _Arrangement(
                torch.tensor(depths, device=device),
                torch.stack([_among(tree, size) for tree in candidates.trees]).to(device),
            )
            self._kept = (candidates.trees, arrangement)
        return self._kept[1]


def _among(tree: DraftTree, size: int) -> torch.Tensor:
    """Who sees whom, `(size, size)`; what stands behind the tree sees itself."""
    missing = size - 1 - tree.num_nodes
    visible = pad(tree.visible, (0, missing, 0, missing))
    visible.diagonal().fill_(True)
    return visible


def _drop_replayed(outputs: ModelOutput, num_replayed: int) -> ModelOutput:
    """Drop the replayed tokens, which come before the nodes, from a backbone's output."""
    outputs.logits = outputs.logits[:, num_replayed:]
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(h[:, num_replayed:] for h in outputs.hidden_states)
    if outputs.get("attentions") is not None:
        outputs.attentions = tuple(
            a if a is None else a[:, :, num_replayed:] for a in outputs.attentions
        )
    return outputs
