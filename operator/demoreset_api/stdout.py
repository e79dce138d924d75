"""What a command prints on: a terminal, a file, a pipe."""

import io
import os
import sys


def lenient() -> None:
    """Print a ? for a character that stdout's encoding lacks; by default it ends the command.

    What is printed where there is no stdout (`>&-`) goes nowhere.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
