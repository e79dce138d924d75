"""Finding a demonstration from nothing, by going back to promising states and acting at random.

The idea is the first phase of Go-Explore (Ecoffet et al. 2021, Nature 590, "First return, then
explore"): the archive keeps, for every cell (a coarse picture of the screen), the best way there;
cells that were chosen seldom are returned to, by restoring the emulator, and explored from.

Work goes in rounds of a fixed number of items. The cells of a round are drawn from the stream
(seed, round), the actions of item i from (seed, round, i), and its results are taken in by the
order of the items: so the archive depends on the seed and the number of rounds alone, not on the
number of processes.
"""

import heapq
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from demoreset_api.errors import DemoResetError
from demoreset_trainer.emulator import Emulator
from demoreset_trainer.streams import stream

FRAME_SKIP = 4
ITEMS = 64  # of a round
DECISIONS = 30  # at most, of an item
REPEAT = 0.9  # chance that an action is the one before
CANDIDATES = 16  # ways to the wanted score that are kept

Key = bytes


@dataclass(frozen=True)
class Grid:
    """How coarse a cell is: pixels of the shrunken screen, and levels of grey."""

    width: int = 11
    height: int = 8
    levels: int = 8

    def __str__(self) -> str:
        """As the flag has it."""
        return f"{self.width}x{self.height}x{self.levels}"

    def key(self, screen: npt.NDArray[np.uint8]) -> Key:
        """The cell of a grey screen."""
        small = cv2.resize(screen, (self.width, self.height), interpolation=cv2.INTER_AREA)
        return (small.astype(np.uint16) * self.levels // 256).astype(np.uint8).tobytes()


NOTHING = -1  # the parent of the game's own start


@dataclass
class Cell:
    """The best way to a cell: more score, then fewer decisions."""

    score: int
    length: int  # decisions from the game's own start
    node: int  # of the tree of ways
    state: bytes  # of the emulator
    chosen: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Higher is better."""
        return self.score, -self.length


@dataclass(frozen=True)
class Found:
    """What an item brings back: a cell, or the wanted score, after the first `steps` actions."""

    key: Key
    score: int
    steps: int
    state: bytes


@dataclass(frozen=True)
class Report:
    """An item's actions (indices), and what they led to."""

    actions: bytes
    found: tuple[Found, ...]
    wanted_at: int  # decisions until the wanted score; 0: not reached


@dataclass
class Archive:
    """All that was found. `ways` is a tree: (parent, actions); a cell's way ends in its node."""

    game: str
    seed: int
    wanted: int  # score
    grid: Grid = Grid()
    rounds: int = 0
    decisions: int = 0
    cells: dict[Key, Cell] = field(default_factory=dict)
    ways: list[tuple[int, bytes]] = field(default_factory=list)
    candidates: list[bytes] = field(default_factory=list)  # ways to `wanted`, shortest first
    first_at: int | None = None  # decisions spent when the wanted score was first reached

    def way(self, node: int) -> bytes:
        """The actions from the game's own start to a node."""
        parts = []
        while node != NOTHING:
            node, actions = self.ways[node]
            parts.append(actions)
        return b"".join(reversed(parts))

    @property
    def best(self) -> Cell:
        """The cell with the highest score, reached soonest."""
        return max(self.cells.values(), key=lambda cell: cell.rank)


class Explorer:
    """Plays items on one emulator; knows what the archive has, so as to bring back news only."""

    def __init__(self, game: str, wanted: int, grid: Grid) -> None:
        self._key = grid.key
        self._emulator = Emulator(game)
        self._screen = np.zeros((self._emulator.height, self._emulator.width), np.uint8)
        self._wanted = wanted
        self.known: dict[Key, tuple[int, int]] = {}

    def start(self) -> Found:
        """The game's own start."""
        emulator = self._emulator
        emulator.reset()
        emulator.grey_into(self._screen)
        return Found(self._key(self._screen), 0, 0, emulator.save())

    def play(self, state: bytes, score: int, length: int, seeds: Sequence[int]) -> Report:
        """Act at random from a state; the item ends early with a lost life or the game."""
        emulator, codes = self._emulator, self._emulator.minimal_actions
        random = stream(*seeds)
        fresh = random.integers(len(codes), size=DECISIONS).tolist()
        keeps = (random.random(DECISIONS) < REPEAT).tolist()
        emulator.restore(state)
        lives = emulator.lives()
        actions, action, wanted_at = bytearray(), fresh[0], 0
        found: dict[Key, Found] = {}
        for step in range(DECISIONS):
            if not keeps[step]:
                action = fresh[step]
            code = codes[action]
            for _ in range(FRAME_SKIP):
                score += emulator.act(code)
            if length == step == 0:  # the game's first frame may give more than power-on
                lives = max(lives, emulator.lives())
            if emulator.game_over() or emulator.lives() < lives:
                break
            actions.append(action)
            if not wanted_at and score >= self._wanted:
                wanted_at = len(actions)
            emulator.grey_into(self._screen)
            key = self._key(self._screen)
            rank = score, -(length + len(actions))
            known, seen = self.known.get(key), found.get(key)
            if (known is None or rank > known) and (
                seen is None or rank > (seen.score, -(length + seen.steps))
            ):
                found[key] = Found(key, score, len(actions), emulator.save())
        return Report(bytes(actions), tuple(found.values()), wanted_at)


# A round's message to a process: news of the archive, and its items.
_Item = tuple[bytes, int, int, list[int]]


def _work(link: Connection, game: str, wanted: int, grid: Grid) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # to all at once it means the parent
    cv2.setNumThreads(0)
    explorer = Explorer(game, wanted, grid)
    while True:
        try:
            news, items = link.recv()
            explorer.known.update(news)
            link.send([explorer.play(*item) for item in items])
        except (EOFError, OSError):
            return


def damage(archive: Archive) -> str | None:
    """What makes an archive from a file unfit to go on with, or None. Tries every state."""
    emulator = Emulator(archive.game)
    for node, (parent, _) in enumerate(archive.ways):
        if not NOTHING <= parent < node:
            return f"way {node} begins at way {parent}"
    for actions in (*(actions for _, actions in archive.ways), *archive.candidates):
        if max(actions, default=0) >= len(emulator.minimal_actions):
            return f"action {max(actions)}; the game has {len(emulator.minimal_actions)}"
    for cell in archive.cells.values():
        if not isinstance(cell.chosen, int) or cell.chosen < 0:
            return f"a cell was chosen {cell.chosen} times"
        try:
            emulator.restore(cell.state)
        except Exception:  # whatever the emulator makes of foreign bytes
            return "a state that is not the emulator's"
    return None


class Crew:
    """Processes that play the items of a round. Its pipes carry our own messages only."""

    def __init__(self, archive: Archive, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        self._processes = []
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        for _ in range(processes):
            here, there = context.Pipe()
            args = (there, archive.game, archive.wanted, archive.grid)
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            there.close()
            self._links.append(here)
            self._processes.append(process)
        signal.signal(signal.SIGINT, before)

    def play(self, news: dict[Key, tuple[int, int]], items: Sequence[_Item]) -> list[Report]:
        """The reports of the items, in their order.

        Raises:
            DemoResetError: a process is gone.
        """
        crew = len(self._links)
        reports: list[Any] = [None] * len(items)
        try:
            for number, link in enumerate(self._links):
                link.send((news, items[number::crew]))
            for number, link in enumerate(self._links):
                reports[number::crew] = link.recv()
        except (EOFError, OSError) as error:
            raise DemoResetError(
                "a process of the exploration ended by itself (out of memory?); the same command "
                "goes on from the archive as it was saved last"
            ) from error
        return reports

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()


def explore(
    archive: Archive,
    *,
    decisions: int,
    processes: int,
    stopping: Callable[[], object] = lambda: False,
) -> Iterator[Archive]:
    """Go on with an archive until it has spent `decisions`; yields it after every round."""
    news: dict[Key, tuple[int, int]] = {key: cell.rank for key, cell in archive.cells.items()}
    if not archive.cells:
        start = Explorer(archive.game, archive.wanted, archive.grid).start()
        archive.ways.append((NOTHING, b""))
        archive.cells[start.key] = Cell(0, 0, 0, start.state)
        news = {start.key: (0, 0)}
    with Crew(archive, processes) as crew:
        while archive.decisions < decisions and not stopping():
            items, parents = _items(archive)
            reports = crew.play(news, items)
            news = _take_in(archive, parents, reports)
            archive.rounds += 1
            yield archive


def _items(archive: Archive) -> tuple[list[_Item], list[Cell]]:
    """The cells that a round returns to: seldom chosen ones more often."""
    cells = list(archive.cells.values())
    random = stream(archive.seed, archive.rounds)
    weights = 1 / np.sqrt(np.array([cell.chosen for cell in cells]) + 1)
    chosen = random.choice(len(cells), ITEMS, p=weights / weights.sum())
    items = []
    for number, index in enumerate(chosen.tolist()):
        cell = cells[index]
        cell.chosen += 1
        # The first one's stream is the one above, from its beginning: see `streams`. Demonstrations
        # were found so, and are found again so.
        seeds = [archive.seed, archive.rounds, number]
        items.append((cell.state, cell.score, cell.length, seeds))
    return items, [cells[index] for index in chosen.tolist()]


def _take_in(
    archive: Archive, parents: Sequence[Cell], reports: Sequence[Report]
) -> dict[Key, tuple[int, int]]:
    """Improve the archive by a round's reports; what is new in it."""
    news = {}
    # A parent may be improved within the round: its items began at the way it had before.
    began = [(cell.node, cell.length) for cell in parents]
    for (node, length), report in zip(began, reports, strict=True):
        archive.decisions += len(report.actions)
        for found in report.found:
            cell = archive.cells.get(found.key)
            better = Cell(found.score, length + found.steps, 0, found.state)
            if cell is not None and better.rank <= cell.rank:
                continue
            better.node = len(archive.ways)
            if cell is not None and not _is_new_place(archive, cell, found):
                better.chosen = cell.chosen
            archive.ways.append((node, report.actions[: found.steps]))
            archive.cells[found.key] = better
            news[found.key] = better.rank
        if report.wanted_at:
            if archive.first_at is None:
                archive.first_at = archive.decisions
            _keep_candidate(archive, node, length, report)
    return news


def _is_new_place(archive: Archive, cell: Cell, found: Found) -> bool:
    """Whether a cell, reached with more score, is to be explored as if it were new.

    It looks the same with the key taken, but the door opens now. Beyond the wanted score nothing
    is left to find.
    """
    return cell.score < found.score < archive.wanted


def _keep_candidate(archive: Archive, node: int, length: int, report: Report) -> None:
    total = length + report.wanted_at
    full = len(archive.candidates) == CANDIDATES
    if full and total >= len(archive.candidates[-1]):
        return
    way = archive.way(node) + report.actions[: report.wanted_at]
    if way not in archive.candidates:
        archive.candidates = heapq.nsmallest(CANDIDATES, [*archive.candidates, way], key=len)
