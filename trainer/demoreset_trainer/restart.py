"""What a supervisor decides: plain values and the present time in, a decision out.

Seconds are of a monotonic clock.
"""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from demoreset_api.errors import ExitCode, NoProgress, NoValidCheckpoint, TryAgain, UserError
from demoreset_api.names import ENV_GRACE, ENV_HANG, ENV_START

PERMANENT = (ExitCode.USER_ERROR, ExitCode.NO_VALID_CHECKPOINT, ExitCode.NO_PROGRESS)
OVER = (ExitCode.DONE, ExitCode.BUDGET_SPENT)
BLAMELESS = (ExitCode.TRY_AGAIN, ExitCode.DRAINED)  # what was away, or who asked, is at fault
MAX_DEATHS = 3  # at the same update
LONGEST_WAIT = 30.0  # seconds until a restart
GRACE_SHARE = 0.8  # of the cluster's: the rest is for the worker's own end


@dataclass(frozen=True)
class Limits:
    """How long a supervisor waits, in seconds."""

    hang: float = 10.0  # without a beat, after the first one
    start: float = 300.0  # until the first beat: imports, and the replay of a long demo
    grace: float = 24.0  # from SIGTERM to SIGKILL
    finish: float = 15.0  # for the others, when the run is over for one member
    jump: float = 1.0  # between two turns: the supervisor itself was frozen

    @property
    def hurry(self) -> float:
        """From SIGTERM on: then a member leaves in the middle of an update, to save in time."""
        return self.grace / 2

    @classmethod
    def told(cls, environment: Mapping[str, str]) -> "Limits":
        """The limits as the environment has them.

        Raises:
            UserError: one of them is not a number of seconds.
        """
        found = {}
        for name, field, part in (
            (ENV_GRACE, "grace", GRACE_SHARE),
            (ENV_HANG, "hang", 1.0),
            (ENV_START, "start", 1.0),
        ):
            if text := environment.get(name):
                found[field] = part * _seconds(name, text)
        return cls(**found)


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{name}: received {text!r}; it is a number of seconds above 0")
    return seconds


@dataclass(frozen=True)
class Record:
    """What has become of the members that followed one another in one place."""

    fruitless: int = 0  # in a row that brought no update, from the latest that did
    deaths: int = 0  # in a row at the same update, while the run came no further
    update: int | None = None  # at which the latest ended
    furthest: int = 0  # update of the run at that time

    def after(
        self, code: int, *, update: int, brought: bool, furthest: int, hung: bool = False
    ) -> "Record":
        """With one more of them.

        Args:
            code: How it ended.
            update: At which.
            brought: Whether it brought the run an update.
            furthest: The run's own, over all of its members.
            hung: Whether it was killed for standing still.
        """
        deaths = self.deaths
        if furthest > self.furthest or update != self.update:
            deaths = 0
        return Record(
            fruitless=1 if brought else self.fruitless + 1,
            deaths=deaths + (hung or code not in BLAMELESS),
            update=update,
            furthest=furthest,
        )

    @property
    def wait(self) -> float:
        """Seconds until the next: none at first, then 1, 2, 4 … while all of them are in vain."""
        doublings = self.fruitless - 2
        return 0.0 if doublings < 0 else min(2.0 ** min(doublings, 10), LONGEST_WAIT)

    @property
    def hopeless(self) -> bool:
        """Whether one more would end as the latest ones did."""
        return self.deaths >= MAX_DEATHS


def hang(
    now: float, *, started: float, heard: float | None, limits: Limits, stopping: bool = False
) -> str | None:
    """Why a member counts as hung; None where it does not. One that was asked to stop has time."""
    if stopping:
        return None
    if heard is None:
        late = now - started > limits.start
        return f"hung: not ready after {limits.start:g} s" if late else None
    return f"hung: no beat for {limits.hang:g} s" if now - heard > limits.hang else None


@dataclass(frozen=True)
class Ending:
    """The run ends here with this code; the members that are left are asked, and then killed."""

    code: int
    ask_at: float
    kill_at: float

    def later(self, seconds: float) -> "Ending":
        """The supervisor was frozen for so long: what it waits for begins anew."""
        return replace(self, ask_at=self.ask_at + seconds, kill_at=self.kill_at + seconds)


def stopped(ending: Ending | None, number: int, now: float, limits: Limits) -> Ending:
    """Somebody wants the supervisor to stop; what was decided before stays so, but hurries."""
    if ending is None:
        return Ending(ExitCode.stopped_by(number), now, now + limits.grace)
    if ending.ask_at <= now:
        return ending
    return replace(ending, ask_at=now, kill_at=now + limits.grace)


def ended(ending: Ending | None, code: int, now: float, limits: Limits) -> Ending | None:
    """A member has ended with a code: whether the run ends with it.

    A goal that is met while everybody stops is met all the same, and a run file that is wrong is
    wrong.
    """
    if code not in PERMANENT + OVER:
        return ending
    if ending is not None:
        by_signal = ending.code in (ExitCode.INTERRUPTED, ExitCode.DRAINED)
        return replace(ending, code=code) if by_signal else ending
    ask_at = now + limits.finish if code in OVER else now
    return Ending(code, ask_at, ask_at + limits.grace)


# Words for people


def words(code: int) -> str:
    """How a process ended, from what `Popen.returncode` says."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


_OWN = (UserError, NoValidCheckpoint, NoProgress, TryAgain)


@dataclass(frozen=True)
class LastError:
    """Why a member ended."""

    kind: str
    message: str
    lines: tuple[str, ...] = ()  # the last that it said

    def __str__(self) -> str:
        if self.message and self.kind in [kind.__name__ for kind in _OWN]:
            return self.message  # a sentence for people
        return f"{self.kind}: {self.message}" if self.message else self.kind

    def report(self, most: int) -> bytes:
        """For a pod's termination message: as many of the last lines as there is room for."""
        head = str(self).encode()[:most]
        kept: list[bytes] = []
        room = most - len(head)
        for line in reversed(self.lines):
            encoded = b"\n" + line.encode()
            if len(encoded) > room:
                break
            room -= len(encoded)
            kept.append(encoded)
        return (head + b"".join(reversed(kept))).decode(errors="ignore").encode()


_RAISED = re.compile(r"(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?")
_OURS = re.compile(r"demoreset(?: \w+)?: ")
_FATAL = re.compile(r"(?:Fatal Python error| +what\(\)): +(?P<why>.+)")


def last_error(lines: Sequence[str], code: int, why: str | None = None) -> LastError:
    """What a member's last words say of its end.

    Args:
        lines: The last that it wrote.
        code: How it ended.
        why: What its supervisor knows better, as that it hung.
    """
    kept = tuple(lines)
    if why is not None:
        kind, _, message = why.partition(": ")
        return LastError(kind, message, kept)
    if code < 0:  # whatever it wrote before, it was not what ended it
        fatal = [match["why"] for line in lines if (match := _FATAL.match(line))]
        return LastError(words(code), fatal[0] if fatal else "", kept)
    for line in reversed(lines):
        if ours := _OURS.match(line):
            return LastError(_kind(code), line[ours.end() :], kept)
    traced = bool(lines) and lines[0][:1].isspace()  # a long one has lost its head
    found: re.Match[str] | None = None
    for line in lines:
        if line.startswith("Traceback ("):
            traced = True
        elif traced and line and not line[0].isspace() and (match := _RAISED.fullmatch(line)):
            found, traced = match, False
    if found is not None:
        return LastError(found["kind"], found["message"] or "", kept)
    return LastError(_kind(code), words(code), kept)


def _kind(code: int) -> str:
    """The name of the error that ends a process with this code."""
    for kind in _OWN:
        if kind.exit_code == code:
            return kind.__name__
    return "Crash"
