"""The command `demoreset`: each command is a module that registers itself; heavy imports wait."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import NoReturn

from demoreset_api.errors import DemoResetError, ExitCode, TryAgain
from demoreset_api.stdout import lenient
from demoreset_trainer.disk import fault
from demoreset_trainer.machine import settle

COMMANDS = (
    "cli_run",
    "cli_evaluate",
    "cli_video",
    "cli_export",
    "cli_demo",
    "cli_plot",
    "cli_worker",
    "cli_coordinator",
)
# Commands whose exit code a machine reads: for them 64 would end the run for good.
SUPERVISED = ("worker", "coordinator", "member", "members")
# What is wrong with a path that a person named, wherever we come upon it.
NAMED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
HIDDEN = "cli_member"  # its commands are typed by nobody, so that nobody is told of them

DESCRIPTION = """Teach an agent an Atari game from one demonstration.

  demoreset run -f demos/freeway-crossing.yaml      train; Ctrl-C saves, the same command goes on
  demoreset evaluate runs/freeway-crossing          how well it plays from the game's own start
  demoreset video runs/freeway-crossing             watch it play
  demoreset demo explore montezuma_revenge --out key.demo.safetensors    find a demonstration
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with our exit code for a mistake of the user."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(ExitCode.USER_ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says how it went (`demoreset_api.errors.ExitCode`)."""
    settle()
    lenient()
    parser = _Parser(
        prog="demoreset",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"demoreset {version('demoreset')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    typed = sys.argv[1:] if arguments is None else arguments
    hidden = [HIDDEN] if typed and typed[0] in ("member", "members") else []
    for name in [*COMMANDS, *hidden]:
        importlib.import_module(f"demoreset_trainer.{name}").register(commands)
    options = parser.parse_args(arguments)
    if getattr(options, "needs_torch", True) and find_spec("torch") is None:
        print("demoreset: install it as demoreset[trainer]; torch is missing", file=sys.stderr)
        return ExitCode.USER_ERROR
    try:
        code = int(options.func(options))
    except DemoResetError as error:
        print(f"demoreset: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("demoreset: interrupted", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:  # `demoreset ... | head`
        code = ExitCode.DONE
    except OSError as error:
        if error.filename and error.errno in NAMED and typed[0] not in SUPERVISED:
            print(f"demoreset: {error.filename}: {error.strerror}", file=sys.stderr)
            code = ExitCode.USER_ERROR
        elif fault(error) is TryAgain:
            print(f"demoreset: {error}", file=sys.stderr)  # a disk behind stdout, maybe
            code = ExitCode.TRY_AGAIN
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:  # Python would try it again, and end with 120 for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"demoreset: not all could be shown: {error.strerror}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
