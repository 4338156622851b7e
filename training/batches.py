"""The order of training: rows of like length together, the same for any number of processes."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL_BATCHES = 50  # global batches whose rows are sorted by length together


class GroupedSampler(Sampler[int]):
    """Shuffles rows so that those of like length share a global batch, to save padding.

    The order depends on the seed and the epoch alone. An epoch is filled up to whole global batches
    with the index behind the last row, an empty row: so each process has its share of every step,
    nothing is learned twice, and as many rows make a step however many processes share it.

    Args:
        lengths: tokens of each row.
        global_batch_size: rows of one optimizer step, over all processes.
        seed: for the shuffling.
    """

    def __init__(self, lengths: Sequence[int], global_batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of indices of an epoch, a multiple of the global batch."""
        return len(self._batch_starts()) * self.global_batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield one epoch's indices, the batch of the longest row first: memory runs out at once."""
        batches = self._batches()
        for batch in batches:
            yield from batch
        yield from [len(self.lengths)] * (len(self) - len(self.lengths))

    def _batch_starts(self) -> range:
        return range(0, len(self.lengths), self.global_batch_size)

    def _batches(self) -> list[list[int]]:
        """Return the epoch's global batches; the last one may be short."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = POOL_BATCHES * self.global_batch_size
        order: list[int] = []
        for start in range(0, len(shuffled), pool):
            order += sorted(shuffled[start : start + pool], key=lambda i: -self.lengths[i])
        batches = [order[start : start + self.global_batch_size] for start in self._batch_starts()]
        *whole, last = batches
        mixed = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        longest = max(mixed, key=lambda batch: self.lengths[batch[0]], default=last)
        return [longest, *(batch for batch in [*mixed, last] if batch is not longest)]
