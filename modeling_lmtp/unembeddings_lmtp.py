"""Unembeddings of leap heads: how a head's features become logits.

`W` is the backbone's unembedding, or its rows for the draft vocabulary.

| `share_lm_head` | `lm_head_rank` | logits of features `f` | parameters per head |
|---|---|---|---|
| true | 0 | `W f` | none |
| true | r | `W f + B (A f)`, starting at `B = 0` | `r (H + D)` |
| false | 0 | `W_i f`, starting at `W_i = W` (arXiv 2505.17505) | `H D` |

With a draft vocabulary, heads propose only some of the tokens. Most tokens of a large vocabulary are never
right for a draft, and a product with the whole unembedding costs as much as several layers. The text is the
same: a token outside is never drafted, but still emitted where plain decoding would emit it.

Some models scale what their unembedding returns (Cohere, Granite, Falcon-H1). Logits of heads are scaled
likewise, so that heads start as the model's own head, and their probabilities compare with the model's.

Shapes: `V` vocabulary size, `D` draft vocabulary size (`V` without one), `H` hidden size, `r` rank, `B`
batch, `n` states of one head, `…` any leading dimensions.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbone_lmtp import copy_common_rows, unembedding_device
from .configuration_lmtp import LAST
from .states_lmtp import run_pass

_logit_scales: "weakref.WeakKeyDictionary[PreTrainedModel, float]" = weakref.WeakKeyDictionary()


@torch.compiler.disable
@torch.no_grad()
def logit_scale(backbone: PreTrainedModel) -> float:
    """Return the factor from what a model's unembedding returns to its logits; 1 for most models.

    It is found out by running two tokens, because configurations have several names for it. A soft cap is
    no factor and gives 1: it hardly changes any but the largest logits.
    """
    if backbone not in _logit_scales:
        tokens = torch.arange(2, device=unembedding_device(backbone))[None]
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()  # dropout would draw, and a run that goes on draws anew
        try:
            outputs, states = run_pass(backbone, LAST, {"input_ids": tokens})
        finally:
            for module, mode in modes:
                module.training = mode
        unscaled = backbone.get_output_embeddings()(states).double()
        logits = outputs.logits.to(unscaled)
        scale = float((unscaled * logits).sum() / unscaled.square().sum())
        is_factor = (logits - scale * unscaled).abs().max() <= 0.01 * logits.abs().max()
        _logit_scales[backbone] = scale if is_factor and abs(scale - 1) > 0.01 else 1.0
    return _logit_scales[backbone]


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that what it is added to starts unchanged."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LowRankUpdate(nn.Module):
    """`B (A f)`, what a head adds to the logits of a shared unembedding; it starts at zero.

    Args:
        hidden_size: `H`.
        rank: `r`.
        vocab_size: `D`.
    """

    def __init__(self, hidden_size: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = ZeroLinear(rank, vocab_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to `(…, D)`."""
        return self.up(self.down(features))

    def resize(self, vocab_size: int) -> None:
        """Resize the vocabulary; new rows are zero."""
        trained = self.up
        self.up = ZeroLinear(trained.in_features, vocab_size, bias=False)
        self.up.to(device=trained.weight.device, dtype=trained.weight.dtype)
        copy_common_rows(trained, self.up)


class DraftUnembedding:
    """The rows of an unembedding for the draft vocabulary; it has no parameters of its own.

    Args:
        source: the backbone's unembedding.
        token_ids: the draft vocabulary; `logits[..., i]` is for `token_ids[i]`.
    """

    def __init__(self, source: Any, token_ids: Sequence[int]) -> None:
        self.source = source
        # An adapted, quantized or offloaded unembedding is more than a weight to select rows from
        self._has_rows = type(source) is nn.Linear and not source.weight.is_meta
        device = source.weight.device if self._has_rows else None
        self.token_ids = torch.tensor(token_ids, device=device)
        is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        self._frozen_rows = None if is_trained else self._rows()

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        if not self._has_rows:
            return None
        bias = self.source.bias
        return self.source.weight[self.token_ids], None if bias is None else bias[self.token_ids]

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to logits `(…, D)`."""
        if not self._has_rows:
            logits = self.source(hidden_states)
            return logits[..., self.token_ids.to(logits.device)]
        weight, bias = self._frozen_rows or self._rows()  # type: ignore[misc]
        return nn.functional.linear(hidden_states, weight, bias)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the backbone's unembedding parameters."""
        return self.source.parameters()


class HeadUnembedding:
    """One head's unembedding: a matrix, perhaps shared, and perhaps the head's low-rank update.

    Args:
        base: `W`, a module or a `DraftUnembedding`; or the head's `W_i`.
        update: the low-rank update, or None.
        scale: see `logit_scale`.
    """

    def __init__(self, base: Any, update: nn.Module | None = None, scale: float = 1.0) -> None:
        self.base = base
        self.update = update
        self.scale = scale

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(…, H)` to logits `(…, D)`."""
        logits = self.base(features)
        return self.scaled(logits if self.update is None else logits + self.update(features))

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale logits as the model scales its own."""
        return logits if self.scale == 1 else logits * self.scale

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of base and update."""
        yield from self.base.parameters()
        if self.update is not None:
            yield from self.update.parameters()


def shared_unembedding(
    backbone: PreTrainedModel, token_ids: Sequence[int] | None
) -> nn.Module | DraftUnembedding:
    """Return the backbone's unembedding, or its rows for the draft vocabulary."""
    unembedding = backbone.get_output_embeddings()
    return unembedding if token_ids is None else DraftUnembedding(unembedding, token_ids)


def unembed(
    unembeddings: Sequence[HeadUnembedding], features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Compute the logits of several heads, in one product if they share a matrix.

    Args:
        unembeddings: one per head.
        features: one `(B, n, H)` per head; `n` may differ.

    Returns:
        `(B, Σ n, D)`.
    """
    base = unembeddings[0].base
    if any(unembedding.base is not base for unembedding in unembeddings):
        pairs = zip(unembeddings, features, strict=True)
        return torch.cat([unembedding(part) for unembedding, part in pairs], dim=1)
    logits = base(torch.cat(list(features), dim=1))
    if unembeddings[0].update is None:
        return unembeddings[0].scaled(logits)
    updates = [
        unembedding.update(part)  # type: ignore[misc]
        for unembedding, part in zip(unembeddings, features, strict=True)
    ]
    return unembeddings[0].scaled(logits + torch.cat(updates, dim=1))


def draft_labels(
    labels: torch.Tensor, token_ids: Sequence[int], vocab_size: int, ignore_index: int
) -> torch.Tensor:
    """Map labels to indices of the draft vocabulary; tokens outside are ignored.

    Args:
        labels: any shape, token ids below `vocab_size` or `ignore_index`.
        token_ids: the draft vocabulary.
        vocab_size: `V`.
        ignore_index: the label of tokens to ignore.

    Returns:
        Labels of the same shape: indices into `token_ids`, or `ignore_index`.
    """
    index_of = torch.full((vocab_size,), ignore_index, device=labels.device)
    index_of[torch.tensor(token_ids, device=labels.device)] = torch.arange(
        len(token_ids), device=labels.device
    )
    return torch.where(labels == ignore_index, ignore_index, index_of[labels.clamp(min=0)])
