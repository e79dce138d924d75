"""A group that loses and gains members: torchft's Lighthouse says who lives, gloo or NCCL adds up.

At every update a member asks the coordinator for a quorum: a barrier and a vote in one, which
returns when every member that beats has asked, or the dead are out. Where the members changed, or
the sums of one of them failed, a new process group is formed, over the store of its first member.
States and results travel as bytes on the group: no pickle, no shared file.
"""

import json
import math
import os
import queue
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, BroadcastOptions, TCPStore  # type: ignore[attr-defined]
from torchft.coordination import LighthouseClient
from torchft.process_group import ProcessGroup, ProcessGroupGloo, ProcessGroupNCCL

from demoreset_api.errors import ExitCode
from demoreset_trainer.events import Events
from demoreset_trainer.group import Leaving, MemberLost, Quorum
from demoreset_trainer.heart import Heart

SLICE = 20.0  # seconds of one question for a quorum; then it is asked again
LEAST_TIMEOUT, PACES = 5.0, 20.0  # a sum may take so many seconds, or so many usual gaps
STATE_TIMEOUT = 60.0  # seconds for handing a state over
ABORT_TIMEOUT = 5.0  # seconds until a process group that does not end costs its member's life
FAREWELL = 5.0  # seconds that who is told to stop waits for one more update with the others
POLL = 0.05  # seconds between looks at a wish to stop while others are waited for
TOLD_AFTER = 10.0  # seconds of waiting until a person is told


class Elastic:
    """The group as one of its members sees it.

    Args:
        coordinator: host:port of the Lighthouse.
        id: Of this member: another one for every life of its process.
        host: Where other members reach this one.
        stopping: Whether this member is to leave.
        note: Told what a person wants to know.
        beat: Called a few times a second while the loop moves.
    """

    def __init__(
        self,
        coordinator: str,
        *,
        id: str,
        host: str,
        stopping: Callable[[], bool],
        note: Callable[[str], None],
        beat: Callable[[], None],
        nccl: bool = False,
    ) -> None:
        self._id, self._host, self._stopping, self._note = id, host, stopping, note
        self._url = f"http://{coordinator}"
        self._events = Events(id)
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        patience = timedelta(seconds=LEAST_TIMEOUT)
        make = ProcessGroupNCCL if nccl else ProcessGroupGloo
        self._pg: ProcessGroup = make(timeout=patience)
        self._on_gpu = nccl
        self._formed = ""  # key of the process group in force; empty when there is none
        self._members: tuple[str, ...] = ()
        self._generation = 0
        self._joined = 0  # generation in which this member came in
        self._fresh = False  # nothing was summed yet since the group was formed
        self._gaps: deque[float] = deque(maxlen=100)  # seconds between sums
        self._summed = 0.0
        self._told = False  # that it waits
        self._asker = _Asker(self._url)
        self._heart = Heart(self._url, id, beat)

    # Agreeing

    def quorum(self, step: int) -> Quorum:
        """Agree on the members, and form their process group where it changed."""
        outage = 0.0
        while True:
            answer, away = self._ask(step)
            outage += away
            members = sorted(answer.participants, key=_seniority)
            ids = tuple(member.replica_id for member in members)
            facts = [member.data or {} for member in members]
            formed = {fact["formed"] for fact in facts}
            self._events.tell("quorum", step=step, generation=self._generation, members=ids)
            if ids != self._members or formed != {self._formed} or not self._formed:
                generation = 1 + max(fact["generation"] for fact in facts)
                try:
                    self._form(answer, members, ids, generation)
                except Exception as error:  # whatever gloo or NCCL make of a member that dies here
                    self._give_up(error)
                    continue
            steps = [member.step for member in members]
            best = max(steps)
            roster = [
                {
                    "id": member.replica_id,
                    "pid": fact["pid"],
                    "host": fact["host"],
                    "update": member.step & ((1 << 40) - 1),
                }
                for member, fact in zip(members, facts, strict=True)
            ]
            return Quorum(
                generation=self._generation,
                rank=ids.index(self._id),
                members=ids,
                source=None if best and min(steps) == best else steps.index(best),
                roster=roster,
                outage=outage,
            )

    def _ask(self, step: int) -> tuple[Any, float]:
        """The coordinator's answer, and for how many seconds it was away."""
        begun = time.monotonic()
        away: float | None = None
        told = self._told = False
        self._heart.start()
        pause = 0.05
        while True:
            try:
                answer = self._wait_for(
                    self._asker.ask(
                        self._id,
                        timeout=timedelta(seconds=SLICE),
                        address=self._host,
                        store_address=f"{self._host}:{self._store.port}",
                        step=step,
                        world_size=1,
                        shrink_only=False,
                        data={
                            "formed": self._formed,
                            "generation": self._generation,
                            "joined": self._joined,
                            "pid": os.getpid(),
                            "host": self._host,
                        },
                    ),
                    lambda: self._waiting(begun),
                )
            except TimeoutError:
                continue
            except (RuntimeError, ConnectionError, OSError) as error:
                away = away or time.monotonic()
                if not told and time.monotonic() - away > 1:
                    told = True
                    self._note(f"the coordinator at {self._url} does not answer ({_first(error)})")
                self._sleep(pause * (0.5 + random.random()))
                pause = min(2 * pause, 1.0)
                self._asker = _Asker(self._url)
                continue
            if self._id not in {member.replica_id for member in answer.participants}:
                continue  # an answer to others: ask again
            if told:
                self._note("the coordinator answers again")
            return answer, time.monotonic() - away if away else 0.0

    def _waiting(self, begun: float) -> None:
        """Waiting for others is life, too."""
        self._heart.moved()
        if not self._told and time.monotonic() - begun > TOLD_AFTER:
            self._told = True
            self._note("waiting for the other members, or for enough of them")

    def _wait_for(self, answer: "queue.Queue[Any]", waiting: Callable[[], None]) -> Any:
        told: float | None = None
        while True:
            if self._stopping():
                told = told or time.monotonic()
                if time.monotonic() - told > FAREWELL:
                    raise Leaving("told to stop while it waited for the others")
            try:
                result = answer.get(timeout=POLL)
            except queue.Empty:
                waiting()
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def _sleep(self, seconds: float) -> None:
        self._heart.moved()
        if self._stopping():
            raise Leaving("told to stop while the coordinator was away")
        time.sleep(seconds)

    def _form(self, answer: Any, members: list[Any], ids: tuple[str, ...], generation: int) -> None:
        begun = time.monotonic()
        # The time of the vote, too: a coordinator that was started again counts from 1 again.
        key = f"{answer.quorum_id}-{answer.created.seconds}-{answer.created.nanos}"
        self._forget_keys()
        if len(ids) == 1:
            self._abort()
        else:
            self._pg.configure(
                f"{members[0].store_address}/{key}", self._id, ids.index(self._id), len(ids)
            )
        self._formed, self._members, self._generation = key, ids, generation
        self._joined = self._joined or generation
        self._fresh = True
        self._events.tell(
            "formed", generation=generation, members=ids, seconds=time.monotonic() - begun
        )

    def _forget_keys(self) -> None:
        """What earlier groups left in this member's store."""
        with suppress(RuntimeError):
            for key in self._store.list_keys():
                if self._formed and self._formed in key:
                    self._store.delete_key(key)

    # Adding up

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the members, in place."""
        now = time.monotonic()
        if self._summed:
            self._gaps.append(now - self._summed)
        self._heart.moved()
        if len(self._members) > 1:
            options = AllreduceOptions()
            self._do(tensor, self._timeout(), lambda one: self._pg.allreduce([one], options))
        self._summed = time.monotonic()
        if self._fresh:
            self._fresh = False
            self._events.tell("summed", generation=self._generation)

    def _timeout(self) -> float:
        """Seconds after which a sum counts as failed: by the run's own pace."""
        usual = statistics.median(self._gaps) if self._gaps else 0.0
        return max(LEAST_TIMEOUT, PACES * usual)

    def _do(self, tensor: Tensor, timeout: float, collective: Callable[[Tensor], Any]) -> None:
        there = tensor.cuda() if self._on_gpu else tensor
        try:
            if not collective(there).wait(timedelta(seconds=timeout)):
                raise RuntimeError("not done in time")
        except Exception as error:  # gloo's and NCCL's errors are RuntimeErrors of many texts
            self._give_up(error)
            raise MemberLost(f"a member was lost: {_first(error)}") from error
        if there is not tensor:
            tensor.copy_(there)

    def _give_up(self, error: Exception) -> None:
        self._formed = ""
        self._abort()

    def _abort(self) -> None:
        """End the process group; where that hangs, this member's life is the price."""
        done = threading.Event()

        def abort() -> None:
            with suppress(Exception):
                self._pg.abort(errored=False)
            done.set()

        threading.Thread(target=abort, daemon=True, name="abort").start()
        if not done.wait(ABORT_TIMEOUT):
            os._exit(ExitCode.TRY_AGAIN)

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every member, in the order of their ranks."""
        count, rank = len(self._members), self._members.index(self._id)
        content = json.dumps(value).encode()
        lengths = torch.zeros(count, dtype=torch.int64)
        lengths[rank] = len(content)
        self.sum(lengths)
        ends = lengths.cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        table = torch.zeros(ends[-1], dtype=torch.uint8)
        table[begins[rank] : ends[rank]] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.sum(table)
        everything = table.numpy().tobytes()
        return [json.loads(everything[low:high]) for low, high in zip(begins, ends, strict=True)]

    def hand_over(self, quorum: Quorum, state: bytes) -> bytes:
        """The state of the source."""
        begun = time.monotonic()
        length = torch.tensor([len(state)], dtype=torch.int64)
        options = BroadcastOptions()
        options.rootRank = quorum.source or 0
        options.rootTensor = 0

        def broadcast(tensor: Tensor) -> None:
            self._heart.moved()
            self._do(tensor, STATE_TIMEOUT, lambda one: self._pg.broadcast([one], options))

        broadcast(length)
        content = torch.zeros(int(length.item()), dtype=torch.uint8)
        if state:
            content = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        broadcast(content)
        self._events.tell("synced", bytes=len(content), seconds=time.monotonic() - begun)
        return content.numpy().tobytes()

    def alive(self) -> None:
        """The loop moves."""
        self._heart.moved()

    def event(self, name: str, **facts: Any) -> None:
        """Write it down, if anybody measures."""
        self._events.tell(name, **facts)

    def close(self) -> None:
        """Leave: the others need not wait until it shows."""
        self._heart.stop()
        if self._formed and len(self._members) > 1:
            self._abort()


class _Asker:
    """Asks in a thread of its own, so that the member can be told to stop meanwhile."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: LighthouseClient | None = None
        self._questions: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._run, daemon=True, name="quorum").start()

    def ask(self, id: str, **facts: Any) -> "queue.Queue[Any]":
        """Where the answer, or the error, will be."""
        answer: queue.Queue[Any] = queue.Queue()
        self._questions.put((answer, id, facts))
        return answer

    def _run(self) -> None:
        while True:
            answer, id, facts = self._questions.get()
            try:
                if self._client is None:
                    self._client = LighthouseClient(self._url, timedelta(seconds=2))
                answer.put(self._client.quorum(id, **facts))
            except BaseException as error:
                answer.put(error)
                if not isinstance(error, TimeoutError):
                    return  # who asks makes another one


def _seniority(member: Any) -> tuple[float, str]:
    """Who has been in the group for longest comes first; then by name."""
    return (member.data or {}).get("joined") or math.inf, member.replica_id


def _first(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
