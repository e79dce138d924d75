"""Harms members of a group from inside: Python reads this file at its start, if on PYTHONPATH.

The product has no hooks for faults. DEMORESET_POISON says what to do, as JSON:

    what: loss | gradient | weights | crash | slow-disk
    seconds: that each flush of a file or folder takes, on a slow disk: of all members
    place: of the members of its supervisor the one that is harmed; all where it is missing
    every: each time that so many updates are done, at the first try, or
    since: in every try from this update on

Whatever it says, SIGUSR2 (1 is the product's) makes a member hold the interpreter's lock for ever.
"""

import ctypes
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

POISONED = "demoreset_trainer.loop"


class Poisoned(RuntimeError):
    """What a poisoned member dies of."""


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as somebody has imported it."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self._name, self._call = name, call

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that others find for the module, with the call behind its execution."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._call(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def poison(order: dict[str, Any], loop: ModuleType) -> None:
    """Change the loop so that it does what DEMORESET_POISON says."""
    what = order["what"]
    optimise, commit = loop.Loop._optimise, loop.Loop._commit

    def due(self: Any, rejected: int = 0) -> bool:
        update, its = self.state.counters.update, self._membership
        place = int(its._members[its.rank].split("-")[-2])
        if place != order.get("place", place):
            return False
        if "since" in order:
            return bool(update >= order["since"])
        return update > 0 and update % order["every"] == 0 and not rejected

    def poisoned_optimise(self: Any, take: Any, quorum: Any, rejected: int) -> Any:
        if what == "weights" or not due(self, rejected):
            return optimise(self, take, quorum, rejected)
        if what == "crash":
            raise Poisoned(f"poisoned at update {self.state.counters.update}")
        harm, losses = float("nan" if what == "loss" else "inf"), self.ppo._losses
        if what == "loss":
            self.ppo._losses = lambda *facts: [part * harm for part in losses(*facts)]
            try:
                return optimise(self, take, quorum, rejected)
            finally:
                self.ppo._losses = losses
        hook = next(self.ppo.policy.parameters()).register_hook(lambda one: one + harm)
        try:
            return optimise(self, take, quorum, rejected)
        finally:
            hook.remove()

    def poisoned_commit(self: Any, *facts: Any) -> None:
        commit(self, *facts)
        if what == "weights" and due(self):
            next(self.ppo.policy.parameters()).data.mul_(float("nan"))

    loop.Loop._optimise = poisoned_optimise
    loop.Loop._commit = poisoned_commit


def slow_down(seconds: float) -> None:
    """Let what is saved take its time, so that a signal comes in the middle of it."""
    flush = os.fsync

    def slowly(fd: Any) -> None:
        time.sleep(seconds)
        flush(fd)

    os.fsync = slowly


# A member, or the process that members are forked from.
if {"member", "members"} & set(sys.orig_argv):
    signal.signal(signal.SIGUSR2, lambda *_: ctypes.PyDLL(None).sleep(100_000))
    order = json.loads(os.environ.get("DEMORESET_POISON", "{}"))
    if order.get("what") == "slow-disk":
        slow_down(order["seconds"])
    elif order:
        sys.meta_path.insert(0, AfterImport(POISONED, partial(poison, order)))
