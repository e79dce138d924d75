"""What a person sees of a run: a live screen on a terminal, plain or JSON lines elsewhere."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from demoreset_trainer.counters import losses
from demoreset_trainer.progress import Progress

PLAIN_EVERY, LIVE_EVERY = 5.0, 0.25  # seconds
# Columns: from which on two facts stand side by side, the longest bar, all labels of the left side
# with the gap after them, a member's name.
WIDE, BAR, LABEL, NAME = 80, 60, 15, 12
FEW = 100_000  # frames that are said with all their digits
# A reader that has gone, a full disk, letters that an encoding lacks: no reason to end a run.
REFUSED = (OSError, UnicodeError)


class Screen(Protocol):
    """Who shows a run."""

    def show(self, progress: Progress) -> None:
        """An update is done."""

    def note(self, text: str) -> None:
        """Something happened that a person wants to know."""

    def close(self) -> None:
        """The run is over; leave the terminal as it was."""


def live(kind: str, stream: TextIO) -> bool:
    """Whether a live screen is shown, over which nobody else may write.

    `kind`: screen, plain or json; auto takes the screen on a terminal that can move its cursor,
    plain lines elsewhere.
    """
    able = stream.isatty() and not Console(file=stream).is_dumb_terminal
    return kind == "screen" or (kind == "auto" and able)


def make_screen(kind: str, stream: TextIO) -> Screen:
    """The one of this kind, as `live` has it."""
    if live(kind, stream):
        return LiveScreen(_Console(file=stream))
    return JsonLines(stream) if kind == "json" else PlainLines(stream)


def say(text: str, stream: TextIO) -> None:
    """Print a line, if anybody takes it."""
    with suppress(*REFUSED):
        stream.write(f"{text}\n")  # at once: others say something from threads of their own
        stream.flush()


def tell(text: str, kind: str) -> None:
    """Tell a person something before a screen of this kind is there, or after it."""
    if kind == "json":
        JsonLines(sys.stdout).note(text)
    else:
        say(text, sys.stdout)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Be silent: rich would end the process."""
        self.quiet = True


class PlainLines:
    """A line every few seconds, and at every note."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = float("-inf")

    def show(self, progress: Progress) -> None:
        """Print a line if the latest one is old enough."""
        if time.monotonic() - self._shown >= PLAIN_EVERY:
            self._shown = time.monotonic()
            say(plain_line(progress), self._stream)

    def note(self, text: str) -> None:
        """Print it."""
        say(text, self._stream)

    def close(self) -> None:
        """Nothing to do."""


class JsonLines:
    """A line of JSON for every update and note."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, progress: Progress) -> None:
        """Print all of it."""
        self._print({"event": "update", **asdict(progress)})

    def note(self, text: str) -> None:
        """Print it."""
        self._print({"event": "note", "text": text})

    def _print(self, content: dict[str, object]) -> None:
        line = {"time": round(time.time(), 3), **content}
        say(json.dumps(line), self._stream)

    def close(self) -> None:
        """Nothing to do."""


class LiveScreen:
    """A few lines that stay in place; notes scroll by above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()
        self._shown = float("-inf")
        self._latest: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Draw it, but no more often than the eye follows."""
        self._latest = progress
        if time.monotonic() - self._shown >= LIVE_EVERY:
            self._shown = time.monotonic()
            with suppress(*REFUSED):
                self._live.update(Picture(progress), refresh=True)

    def note(self, text: str) -> None:
        """Print it above."""
        with suppress(*REFUSED):
            self._console.print(Text(text, style="dim"))

    def close(self) -> None:
        """Leave the latest picture and give the terminal back."""
        if self._latest is not None:
            self._live.update(Picture(self._latest))  # `stop` draws it
        with suppress(*REFUSED):
            self._live.stop()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def plain_line(progress: Progress) -> str:
    """One update as one line."""
    p = progress
    parts = [
        duration(p.seconds),
        f"{_count(p.frames)} frames",
        f"start {p.start_frame} of {p.demo_frames}",
        f"success there {p.success_rate:.0%}",
    ]
    if p.episode_score_mean is not None:
        parts.append(f"score {p.episode_score_mean:,.0f}")
    if p.goal_rate is not None:
        parts.append(f"from the game's own start {p.goal_rate:.0%} (goal {p.goal:.0%})")
    if p.eta_seconds is not None and p.start_frame:
        parts.append(f"{duration(p.eta_seconds)} to the start")
    if p.frames_per_second:  # not known yet at the first update
        parts.append(f"{p.frames_per_second:,.0f} frames/s")
    if p.members > 1:
        parts.append(f"{p.members} members")
    if p.stall_rung:
        parts.append(f"remedy {p.stall_rung}")
    if p.checkpoint_error:
        parts.append(f"CHECKPOINT NOT WRITTEN: {p.checkpoint_error}")
    return "  ".join(parts)


@dataclass(frozen=True)
class Picture:
    """One update as a picture that fits the terminal: its columns, its characters."""

    progress: Progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it anew, whenever the terminal has another width."""
        p = self.progress
        yield _bar(p.progress_ratio, options)
        yield _facts(p, options)
        if _grouped(p):
            yield _roster(p.roster, options.max_width)


def _bar(mastered: float, options: ConsoleOptions) -> Text:
    bar = Text(" game's start ", style="dim", no_wrap=True, overflow="crop")
    length = max(0, min(BAR, options.max_width - len(bar)))
    full = round(length * mastered)
    ahead, behind = ".#" if options.ascii_only else "░█"
    bar.append(ahead * (length - full), style="dim")
    return bar.append(behind * full, style="green")


def _facts(p: Progress, options: ConsoleOptions) -> Table:
    goal = "none yet" if p.goal_rate is None else f"{p.goal_rate:.0%} of {p.goal:.0%} wanted"
    ahead = "reached" if p.start_frame == 0 else "not known yet"
    if p.start_frame and p.eta_seconds is not None:
        ahead = f"in {duration(p.eta_seconds)}"
    of = f" of {_budget(p.budget_frames)}" if p.budget_frames else ""
    speed = f"{p.frames_per_second:,.0f}" if p.frames_per_second else "not known yet"
    mean, best = p.episode_score_mean, p.episode_score_max
    scores = "none yet" if mean is None else f"{mean:,.0f}, best {best:,.0f}"
    rows = [
        ("start", f"frame {p.start_frame} of {p.demo_frames}", "game's start", ahead),
        ("success there", f"{p.success_rate:.0%}", "from there", goal),
        ("frames", f"{_count(p.frames)}{of}", "frames/s", speed),
        ("time", duration(p.seconds), "scores", scores),
        ("learning rate", _coefficient(p), "entropy", f"{p.entropy:.2f}"),
        ("checkpoint", _checkpoint(p), "episodes", _outcomes(p)),
    ]
    if _grouped(p):
        recovered = f"{losses(p.recoveries):,}, goodput {p.goodput:.1%}"
        generation = f"{p.members}, generation {p.generation:,}"
        rows.append(("members", generation, "recoveries", recovered))
    facts = Table.grid(padding=(0, 2))
    wide = options.max_width >= WIDE
    cut: OverflowMethod = "crop" if options.ascii_only else "ellipsis"
    for label in ("learning rate", "game's start")[: 1 + wide]:  # the longest of each column
        # No cell wraps: a picture whose height changes flickers.
        facts.add_column(style="dim", no_wrap=True, min_width=len(label))
        facts.add_column(min_width=22 if wide else None, no_wrap=True, overflow=cut)
    for row in rows:
        for cells in (row,) if wide else (row[:2], row[2:]):
            facts.add_row(*cells)
    return facts


def _grouped(p: Progress) -> bool:
    return p.members > 1 or p.generation > 1


def _count(frames: int) -> str:
    return f"{frames:,}" if frames < FEW else f"{frames / 1e6:.2f} M"


def _budget(frames: int) -> str:
    """A budget as it was meant: 1,000 M, 2.5 M, or all digits where they are few."""
    if frames < FEW:
        return f"{frames:,}"
    return f"{frames / 1e6:,.2f}".rstrip("0").rstrip(".") + " M"


def _roster(roster: Sequence[dict[str, Any]], width: int) -> Text:
    """Who trains, in one line, whatever their number: the first one first."""
    told = short_names([member["id"] for member in roster])
    if width >= WIDE:
        told = [f"{name} ({member['pid']})" for name, member in zip(told, roster, strict=True)]
    shown = len(told)
    while shown and len(_listed(told, shown)) > width - LABEL:
        shown -= 1
    line = Text("who".ljust(LABEL), style="dim", no_wrap=True, overflow="crop")
    return line.append(_listed(told, shown), style="not dim")


def _listed(told: Sequence[str], shown: int) -> str:
    rest = len(told) - shown
    return ", ".join([*told[:shown], *([f"{rest} more"] if rest else [])])


def short_names(ids: Sequence[str]) -> list[str]:
    """The ids without the words that all of them begin with; of a long one, its end."""
    words = [name.split("-") for name in ids]
    common = 0
    while len(ids) > 1 and all(len(name) > common + 1 for name in words):
        if len({name[common] for name in words}) > 1:
            break
        common += 1
    names = ["-".join(name[common:]) for name in words]
    return [name if len(name) <= NAME else ".." + name[2 - NAME :] for name in names]


def _coefficient(p: Progress) -> str:
    remedy = f" (remedy {p.stall_rung})" if p.stall_rung else ""
    return f"{p.learning_rate:.1e}{' stalled' if p.stalled else remedy}"


def _checkpoint(p: Progress) -> str:
    if p.checkpoint_error:
        return "NOT WRITTEN"
    if p.checkpoint_age_seconds is None:
        return "none yet"
    return f"{duration(p.checkpoint_age_seconds)} ago"


def _outcomes(p: Progress) -> str:
    words = {"SUCCESS": "tied", "LIFE_LOST": "lost a life", "BEHIND": "behind", "GAME_OVER": "over"}
    counts = sorted(p.outcomes.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{count} {words.get(end, end.lower())}" for end, count in counts)
