"""The `lmtp` command line: each command reads its arguments and calls one function."""

from modeling_lmtp.conversion import (
    cli_analysis,
    cli_benchmarks,
    cli_conversion,
    cli_decoding,
    cli_publishing,
    cli_training,
)
from modeling_lmtp.conversion.cli_base import app

__all__ = [
    "app",
    "cli_analysis",
    "cli_benchmarks",
    "cli_conversion",
    "cli_decoding",
    "cli_publishing",
    "cli_training",
]
