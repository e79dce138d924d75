"""What a command prints on: a terminal, a file, a pipe."""

import io
import sys


def lenient() -> None:
    """Print a ? for a character that stdout's encoding lacks; by default it ends the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
