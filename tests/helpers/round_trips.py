"""Counts what makes the host wait for the device, for the tests of the decoding loop."""

import torch

WAITING = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero")


def count_round_trips(monkeypatch) -> list[str]:
    """Return a list that grows by a name with every call from now on."""
    trips: list[str] = []
    for name in WAITING:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _own=original, _name=name):
            trips.append(_name)
            return _own(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return trips
