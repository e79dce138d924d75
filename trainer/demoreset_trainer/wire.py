"""What a member tells its supervisor: lines of JSON on a pipe that it inherits.

The supervisor has no torch and no group; all that it knows of a member is what comes this way, and
that the member's process lives. A beat says "my loop moves": it stops when the loop stands still.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from demoreset_api.names import STARTING
from demoreset_trainer.progress import Progress

ASK_WHERE = signal.SIGUSR1  # has a member write where its threads stand, and go on


@dataclass(frozen=True)
class Beat:
    """A member's loop moves."""

    update: int
    phase: str


@dataclass(frozen=True)
class Note:
    """Something that a person wants to know; other members of the group may say the same."""

    update: int
    text: str


Message = Beat | Note | Progress
_KINDS: dict[str, type[Message]] = {"beat": Beat, "note": Note, "progress": Progress}


class Wire:
    """The member's end; the loop's `Watch`.

    Args:
        descriptor: Of the pipe.
        hung_up: Called when nobody listens: the supervisor is gone, or has given this member up.
    """

    def __init__(self, descriptor: int, hung_up: Callable[[], None] = lambda: None) -> None:
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "wb")
        self._lock = threading.Lock()
        self._beat = Beat(0, STARTING)
        self._hung_up = hung_up

    def phase(self, name: str) -> None:
        """The loop has entered a phase."""
        self._beat = Beat(self._beat.update, name)

    def update(self, progress: Progress) -> None:
        """An update is done."""
        self._beat = Beat(progress.update, self._beat.phase)
        self._send("progress", progress)

    def note(self, text: str) -> None:
        """Something happened that a person wants to know."""
        self._send("note", Note(self._beat.update, text))

    def beat(self) -> None:
        """Say that the loop moves."""
        self._send("beat", self._beat)

    def _send(self, kind: str, message: Message) -> None:
        line = json.dumps({"kind": kind, **asdict(message)}).encode() + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except BrokenPipeError:
                self._hung_up()
            except OSError:
                return

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._file.close()


def parse(line: bytes) -> Message | None:
    """A message; None where the line was torn by the member's end."""
    try:
        content = json.loads(line)
        return _KINDS[content.pop("kind")](**content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
