"""The order of training rows: similar lengths share a batch, for any number of processes."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL_BATCHES = 50  # as in Transformers, sort by length within a pool, not over the whole epoch


class GroupedSampler(Sampler[int]):
    """Shuffles rows so that rows of similar length share a global batch, to save padding.

    The order depends only on the seed and the epoch. The sampler fills the last global batch of an epoch
    with the index `len(lengths)`, which datasets return as an empty row. Every process then gets its
    share of every step, no row is seen twice, and the rows of a step do not depend on the number of
    processes.

    Args:
        lengths: number of tokens of each row.
        global_batch_size: rows per optimizer step, over all processes.
        seed: seed of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], global_batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of indices per epoch, a multiple of `global_batch_size`."""
        return len(self._batch_starts()) * self.global_batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield one epoch's indices, the longest batch first, so that out-of-memory shows at once."""
        for batch in self._batches():
            yield from batch
        yield from [len(self.lengths)] * (len(self) - len(self.lengths))

    def _batch_starts(self) -> range:
        return range(0, len(self.lengths), self.global_batch_size)

    def _batches(self) -> list[list[int]]:
        """Return the epoch's global batches; an incomplete one comes last."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = POOL_BATCHES * self.global_batch_size
        order: list[int] = []
        for start in range(0, len(shuffled), pool):
            order += sorted(shuffled[start : start + pool], key=lambda i: -self.lengths[i])
        batches = [order[start : start + self.global_batch_size] for start in self._batch_starts()]
        *full, last = batches
        shuffled_batches = [
            full[i] for i in torch.randperm(len(full), generator=generator).tolist()
        ]
        longest = max(shuffled_batches, key=lambda batch: self.lengths[batch[0]], default=last)
        return [longest, *(batch for batch in [*shuffled_batches, last] if batch is not longest)]
