"""`demoreset coordinator`: knows which members of a run live."""

import argparse
import os
import signal
import time
from typing import NoReturn

from demoreset_api.errors import ExitCode
from demoreset_api.names import COORDINATOR_PORT, ENV_DEAD
from demoreset_trainer.flags import whole

HELP = """Serve the members of a run: who lives, and who trains together.

One for each run, started by the operator or by `demoreset run --members`; it holds no state that
is worth keeping, and may be killed and started again at any time: the members wait for it. Its
port has no authentication: let only the run's own members reach it.

  demoreset coordinator --min 2
"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "coordinator",
        help="know which members of a run live",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65535),
        default=COORDINATOR_PORT,
        help=f"0: a free one; default {COORDINATOR_PORT}",
    )
    parser.add_argument("--host", default="::", help="address to listen on; default: all")
    parser.add_argument(
        "--min",
        type=whole(1, 65536),
        default=1,
        help="train only while at least so many members live; default 1",
    )
    parser.add_argument(
        "--dead-ms",
        type=whole(100, 600_000),
        default=os.environ.get(ENV_DEAD, "700"),  # as text, so that it is checked like the flag
        help=f"a member that was not heard for so long is lost; default ${ENV_DEAD}, else 700",
    )
    # Of `demoreset run --members`: no coordinator is left behind.
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(func=run, needs_torch=False)


class _Asked(Exception):
    """To stop, by a signal."""


def run(options: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    # One of `run --members` is ended by that alone: who stops a whole group of processes means all
    # of them, and the members need it until they have stopped.
    handler = _stop if options.parent is None else signal.SIG_IGN
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    try:
        return _serve(options)
    except _Asked as asked:
        (number,) = asked.args
        return ExitCode.stopped_by(number)


def _stop(number: int, _frame: object) -> NoReturn:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # once is enough
    raise _Asked(number)


def _serve(options: argparse.Namespace) -> NoReturn:
    from demoreset_trainer import coordinator

    if options.parent is not None:
        from demoreset_trainer.parent import end_with_parent

        end_with_parent(signal.SIGKILL, options.parent)
    server = coordinator.serve(
        options.host,
        options.port,
        least=options.min,
        dead_ms=options.dead_ms,
        waits=coordinator.back_off(),
    )
    coordinator.say(
        f"coordinator on port {coordinator.port_of(server)}: "
        f"{options.min} or more members, lost after {options.dead_ms} ms without a beat"
    )
    while True:
        time.sleep(0.5)  # `signal.pause` would miss a signal that comes just before it
