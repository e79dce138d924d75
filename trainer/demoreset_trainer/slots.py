"""Many slots in processes, over one shared buffer without pickles.

`ale.act` holds the interpreter's lock, so slots run in processes: each steps its own ones, every
P-th, one after the other, writes what they see straight into shared arrays, and begins the next
episode of a slot that ended within the same step. The parent says beforehand where that will be.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from demoreset_api.errors import DemoResetError
from demoreset_trainer.demo import Demo, from_bytes
from demoreset_trainer.emulator import stocked
from demoreset_trainer.env import DemoResetEnv, End, Rules
from demoreset_trainer.parent import end_with_parent
from demoreset_trainer.restart import words
from demoreset_trainer.states import View

_BEGIN, _DONE = b"b", b"d"
_STEP = struct.Struct("ii")  # first slot, and the one behind the last
IDLE = 255  # instead of an action: this slot is not played
STARTING = 120.0  # seconds until a process that has said nothing counts as hung


class SlotsDied(DemoResetError):
    """A process of environments is gone."""


@dataclass(frozen=True)
class Begin:
    """Where a slot's next episode begins, and the seed of its random stream."""

    start: int
    seed: int
    limits: bool = True


# name, dtype, shape behind the number of slots
_FIELDS: tuple[tuple[str, Any], ...] = (
    ("action", np.uint8),
    ("reward", np.float32),
    ("end", np.uint8),  # of the episode that ended in this step, End.NONE where none did
    ("score", np.int64),  # of that episode; likewise below
    ("highest", np.int64),  # score at any time of it
    ("frame", np.int64),
    ("success", np.bool_),
    ("begins", np.bool_),  # an episode begins here now, whatever was played
    ("next_start", np.int64),
    ("next_seed", np.int64),
    ("next_limits", np.bool_),
)


class _Shared:
    """The arrays that parent and processes share; `buffers` are what crosses the spawn."""

    def __init__(self, slots: int, view: View, buffers: dict[str, Any] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        image = int(np.prod(view.shape))
        sizes = {name: np.dtype(dtype).itemsize for name, dtype in _FIELDS}
        sizes |= {"observation": image, "last_observation": image}
        # Unlinked at birth: nothing is left behind, however the processes end.
        self.buffers = buffers or {
            name: context.RawArray(ctypes.c_uint8, slots * size) for name, size in sizes.items()
        }
        self.arrays: dict[str, npt.NDArray[Any]] = {
            name: np.frombuffer(self.buffers[name], dtype) for name, dtype in _FIELDS
        }
        for name in ("observation", "last_observation"):
            flat = np.frombuffer(self.buffers[name], np.uint8)
            self.arrays[name] = flat.reshape(slots, *view.shape)


class Slots:
    """`slots` environments in `processes` processes; each is made when its first episode begins.

    Between `begin` or `wait` and the next `send` of a slot its places in the arrays are the
    caller's: it writes `action`, and for every slot that ended the next episode by `plan`.
    `observation` [slots, ...] is what every slot sees now; `last_observation` what an episode that
    ended in this step saw last.

    Raises:
        SlotsDied: from `ready`, `wait` and `begin`, when a process is gone; from `ready` also when
            one does not come.
    """

    def __init__(self, demo: Demo, rules: Rules, view: View, *, slots: int, processes: int) -> None:
        self.view = view
        shared = _Shared(slots, view)
        arrays = shared.arrays
        self.observation, self.last_observation = arrays["observation"], arrays["last_observation"]
        self.action, self.reward, self.end = arrays["action"], arrays["reward"], arrays["end"]
        self.score, self.highest = arrays["score"], arrays["highest"]
        self.frame, self.success = arrays["frame"], arrays["success"]
        self._begins = arrays["begins"]
        self._next = arrays["next_start"], arrays["next_seed"], arrays["next_limits"]
        self._ready = False
        self._begun = time.monotonic()
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        # At the latest when the parent ends: multiprocessing would ask with SIGTERM, and wait.
        self._finalizer = Finalize(self, _end, (self._links, self._processes), exitpriority=0)
        # Where emulators were made beforehand, processes that are forked have them.
        forked = stocked(demo.game)
        context: Any = multiprocessing.get_context("fork" if forked else "spawn")
        count, file = min(processes, slots), demo.to_bytes()
        # Ctrl-C is the parent's business, also while it makes them: children inherit that it is
        # blocked, and the parent gets it afterwards. The tracker's start would let it through.
        stays = _in_main_thread()
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number in range(count):
                here, there = context.Pipe()
                process = context.Process(
                    target=_run,
                    args=(
                        *(there, file, rules, view, shared.buffers),
                        *(slots, number, count, stays, forked),
                    ),
                    name=f"slots-{number}-of-{count}",
                    daemon=True,
                )
                process.start()
                there.close()
                self._links.append(here)
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ready(self, alive: Callable[[], None] = lambda: None) -> Self:
        """Wait until the processes are there, seconds after they were begun; itself."""
        if not self._ready:
            for link, process in zip(self._links, self._processes, strict=True):
                while not link.poll(0.1):
                    alive()
                    # Whoever waits here looks alive: nobody else would notice.
                    if (waited := time.monotonic() - self._begun) > STARTING:
                        raise SlotsDied(
                            f"the environment process {process.name} (pid {process.pid}) has said "
                            f"nothing for {waited:.0f} s since it was started"
                        )
            self.wait()
            self._ready = True
        return self

    def plan(self, slot: int, begin: Begin) -> None:
        """Say where the slot's next episode begins."""
        start, seed, limits = self._next
        start[slot], seed[slot], limits[slot] = begin.start, begin.seed, begin.limits

    def reset(self, begins: Sequence[Begin]) -> None:
        """Begin an episode in every slot."""
        self.begin(dict(enumerate(begins)))

    def begin(self, begins: Mapping[int, Begin]) -> None:
        """Begin an episode in these slots; the others stay as they are."""
        self.ready()
        self._begins[:] = False
        for slot, begin in begins.items():
            self.plan(slot, begin)
            self._begins[slot] = True
        self._tell(_BEGIN)
        self.wait()

    def send(self, first: int = 0, end: int | None = None) -> None:
        """Let the slots from `first` to before `end` play their `action`; returns at once.

        Other slots may be told before these were waited for.
        """
        self._tell(_STEP.pack(first, len(self.action) if end is None else end))

    def wait(self) -> None:
        """Wait until the slots of the earliest `send` have played."""
        for link, process in zip(self._links, self._processes, strict=True):
            try:
                answer = link.recv_bytes()
            except (EOFError, OSError):
                answer = b""
            if not answer:
                process.join(1)
                code = process.exitcode
                how = words(code) if code is not None else "it said nothing and has not ended"
                why = "; its own lines above say why" if code is not None and code > 0 else ""
                raise SlotsDied(f"the environment process {process.name} is gone ({how}){why}")

    def _tell(self, what: bytes) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):  # `wait` finds out, and says which
                link.send_bytes(what)

    @property
    def pids(self) -> list[int]:
        """Process ids, for those who measure memory or inject faults."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the processes."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(links: list[Connection], processes: list[Any]) -> None:
    for link in links:
        link.close()
    for process in processes:
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
    links.clear()
    processes.clear()


def _close_sockets(but: int) -> None:
    """Close what a fork has of its parent's connections, which would stay open with it.

    It would not see the parent hang up, nor the other members of a group that the parent has left
    them: they would wait for the limit of a sum.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if int(name) not in (0, 1, 2, but) and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _run(
    link: Connection,
    demo_file: bytes,
    rules: Rules,
    view: View,
    buffers: dict[str, Any],
    slots: int,
    number: int,
    count: int,
    parent_stays: bool,
    forked: bool,
) -> None:
    """A process: step its slots whenever the parent says so, until it hangs up."""
    if forked:
        _close_sockets(link.fileno())
    # Whoever stops all processes of a run at once (timeout, systemd, Slurm) means the parent, which
    # still needs this one to end in good order.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent_stays:  # one that hangs in the emulator would not see that the parent is gone
        end_with_parent()
    if hasattr(os, "SCHED_BATCH"):
        # One that is told to play does not take the core at once from the parent, which has the
        # others to tell as well. Where that cannot be asked for (gVisor), it is as good without.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    cv2.setNumThreads(0)
    arrays = _Shared(slots, view, buffers).arrays
    demo = from_bytes(demo_file, "demo")
    envs = {number: DemoResetEnv(demo, rules=rules, view=view)}
    states = envs[number].states
    observation, last = arrays["observation"], arrays["last_observation"]
    action, reward, end = arrays["action"], arrays["reward"], arrays["end"]
    score, highest = arrays["score"], arrays["highest"]
    frame, success = arrays["frame"], arrays["success"]

    def begin(slot: int) -> None:
        if slot not in envs:
            envs[slot] = DemoResetEnv(demo, rules=rules, view=view, states=states)
        env = envs[slot]
        env.reseed(int(arrays["next_seed"][slot]))
        env.begin(int(arrays["next_start"][slot]), bool(arrays["next_limits"][slot]))

    own = range(number, slots, count)
    while True:
        try:
            link.send_bytes(_DONE)
            message = link.recv_bytes()
        except (EOFError, OSError):
            return
        if message == _BEGIN:
            for slot in own:
                if arrays["begins"][slot]:
                    begin(slot)
                    observation[slot] = envs[slot].observation
        else:
            told = range(*_STEP.unpack(message))
            for slot in own:
                if slot not in told:
                    continue
                if action[slot] == IDLE:
                    reward[slot], end[slot] = 0, End.NONE
                    continue
                env = envs[slot]
                reward[slot] = env.play(int(action[slot]))
                ended = env.end
                end[slot] = ended
                if ended is not End.NONE:
                    score[slot], highest[slot], frame[slot] = env.score, env.highest, env.frame
                    success[slot] = env.succeeded
                    last[slot] = env.observation
                    begin(slot)
                observation[slot] = env.observation
