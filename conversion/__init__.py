"""Checkpoints in and out: wrapping, converting, merging, exporting, cards, publishing."""
