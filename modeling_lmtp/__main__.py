"""The `lmtp` command line: each command reads its arguments and calls one function."""

from modeling_lmtp.benchmarks import cli_analysis, cli_benchmarks, cli_decoding
from modeling_lmtp.conversion import cli_conversion, cli_publishing
from modeling_lmtp.conversion.cli_base import app
from modeling_lmtp.training import cli_training

__all__ = [
    "app",
    "cli_analysis",
    "cli_benchmarks",
    "cli_conversion",
    "cli_decoding",
    "cli_publishing",
    "cli_training",
]

if __name__ == "__main__":
    app()
