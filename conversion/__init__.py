"""The command line and what it does: demo, checks, conversion."""
