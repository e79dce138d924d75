"""A group that loses and gains members: torchft's Lighthouse says who lives, gloo or NCCL adds up.

At every update a member asks the coordinator for a quorum: a barrier and a vote in one, which
returns when every member that beats has asked, or the dead are out. Where the members changed, or
the sums of one of them failed, a new process group is formed, over the store of its first member.
States and results travel as bytes on the group: no pickle, no shared file.
"""

import faulthandler
import json
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, BroadcastOptions, TCPStore  # type: ignore[attr-defined]
from torchft.process_group import ProcessGroup, ProcessGroupGloo, ProcessGroupNCCL

from demoreset_api.errors import ExitCode, TryAgain
from demoreset_api.names import ASIDE, QUORUM
from demoreset_trainer.checkpoint_writer import LAST_SAVE
from demoreset_trainer.events import Events
from demoreset_trainer.group import Leaving, MemberLost, Quorum, first_line, update_of
from demoreset_trainer.heart import CUT_OFF, Heart
from demoreset_trainer.links import GIVEN_UP, KEY, OLDEST, Links, fetch, outcast, quick, slow
from demoreset_trainer.network import listen
from demoreset_trainer.question import Question
from demoreset_trainer.waits import POLL, Waits

MIN_TIMEOUT, PACE_GAPS = 5.0, 3.0  # seconds that a sum may take, or so many of the longest gaps
STATE_TIMEOUT = 60.0  # seconds until a state that is handed over begins to come
PIECE, PIECE_TIMEOUT = 4 << 20, 10.0  # bytes of it that go over at once, and their seconds
ABORT_TIMEOUT = 5.0  # seconds that the end of a process group is waited for
SETTLE = 3.0  # seconds that new members wait for one that has the run's state to come back
GATHER = 10.0  # seconds that they wait for those that were started with them
MIN_REST, MAX_REST = 5.0, 300.0  # seconds of sitting out; longer each time
MAX_FAILURES = 3  # to form the group, in a row, before a person is told


def sum_timeout(gap: float) -> float:
    """Seconds after which a sum counts as failed, where the longest gap between two was so long."""
    return max(MIN_TIMEOUT, min(PACE_GAPS * gap, max(STATE_TIMEOUT, 2 * gap)))


class Elastic:
    """The group as one of its members sees it.

    Args:
        coordinator: host:port of the Lighthouse.
        id: Of this member: another one for every life of its process.
        host: Where other members reach this one; it listens nowhere else.
        stopping: Whether this member is to leave.
        hurry: Seconds from then on after which it leaves in the middle of an update.
        begun: Whether the run has begun, so that others may have its state.
        note: Told what a person wants to know.
        beat: Called a few times a second while the loop moves.
        phase: Told when the loop is in another phase: while this member sits out.
        nccl: Whether tensors are summed by NCCL, on the GPU.
        together: So many members were started together: a run begins with all of them, as its
            first updates are another's where one comes later.

    Raises:
        UserError: `host` is no address of this machine.
        TryAgain: its name cannot be looked up for now.
    """

    def __init__(
        self,
        coordinator: str,
        *,
        id: str,
        host: str,
        stopping: Callable[[], bool],
        hurry: float,
        begun: Callable[[], bool],
        note: Callable[[str], None],
        beat: Callable[[], None],
        phase: Callable[[str], None],
        nccl: bool = False,
        together: int = 1,
    ) -> None:
        self._together = together
        self._id, self._host, self._begun, self._note, self._phase = id, host, begun, note, phase
        self._events = Events(id)
        url = f"http://{coordinator}"
        self._heart = Heart(url, id, beat)
        self._waits = Waits(self._heart, stopping, hurry)
        self._question = Question(url, self._heart, self._waits, note)
        with listen(host) as place:  # else it listens everywhere, and tries its host for minutes
            port = place.getsockname()[1]
            self._store = TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=place.detach()
            )
        self._links = Links(self._store)
        self._stores: dict[str, str] = {}  # of the members of the latest quorum
        self._rest = 0.0  # seconds that it sits out next time, before it looks at its links
        self._back = 0.0  # when it came back from that
        self._agreed = 0.0  # when the latest quorum was
        self._summing = 0.0  # seconds in sums since then
        self._doubted = False  # its links were looked at since then
        patience = timedelta(seconds=MIN_TIMEOUT)
        make = ProcessGroupNCCL if nccl else ProcessGroupGloo
        self._make: Callable[[], ProcessGroup] = partial(make, timeout=patience)
        self._pg = self._make()
        self._on_gpu = nccl
        self._formed = ""  # key of the process group in force; empty when there is none
        self._members: tuple[str, ...] = ()
        self._generation = 0
        self._joined = 0  # generation in which this member came in
        self._fresh = False  # nothing was summed yet since the group was formed
        self._gaps: deque[float] = deque(maxlen=100)  # seconds from a sum to the next, here
        self._pace = 0.0  # the longest of them, of any member of the latest quorum
        self._summed = 0.0  # when the latest of this update ended
        self._handed = False  # the state went over, and nothing was summed since

    # Agreeing

    def quorum(self, step: int) -> Quorum:
        """Agree on the members, and form their process group where it changed."""
        outage, failures = 0.0, 0
        self._summed = 0.0
        while True:
            answer, away = self._question.ask(
                step,
                lambda: self._facts(step),
                address=self._host,
                store_address=f"{self._host}:{self._store.port}",
            )
            outage += away
            members = sorted(answer.participants, key=_seniority)
            facts = [member.data for member in members]
            ids = tuple(fact["id"] for fact in facts)
            back = {fact["id"] for fact in facts if fact.get("back")}
            self._links.forget(ids if self._id in back else back)
            if len(set(ids)) < len(ids):
                continue  # one that was given up was counted, too; it has no beats any more
            self._stores = dict(zip(ids, (member.store_address for member in members), strict=True))
            if out := outcast(ids, {fact["id"]: fact.get("links", {}) for fact in facts}, back):
                self._sit_out(out)
                continue
            formed = {fact["formed"] for fact in facts}
            self._events.tell("quorum", step=step, generation=self._generation, members=ids)
            steps = [member.step for member in members]
            best = max(steps)
            # A coordinator that was away knows first who asks first: perhaps a member that has just
            # been started, while those that have the run's state still try to reach it.
            new = not best and max(fact["waited"] for fact in facts) < SETTLE
            if new or (not best and len(ids) < max(fact.get("together", 1) for fact in facts)):
                self._waits.sleep(POLL)
                continue
            if ids != self._members or formed != {self._formed} or not self._formed:
                generation = 1 + max(fact["generation"] for fact in facts)
                try:
                    self._form(answer, members, ids, generation)
                except Leaving:
                    raise
                except Exception as error:  # whatever gloo or NCCL make of a member that dies here
                    self._give_up()
                    failures += 1
                    if failures % MAX_FAILURES == 0:
                        self._note(
                            f"the group of {len(ids)} could not be formed {failures} times: "
                            f"{first_line(error)}"
                        )
                    continue
            roster = [
                {
                    "id": fact["id"],
                    "pid": fact["pid"],
                    "host": fact["host"],
                    "update": update_of(member.step),
                }
                for member, fact in zip(members, facts, strict=True)
            ]
            self._agreed, self._summing, self._doubted = time.monotonic(), 0.0, False
            self._pace = max(fact.get("pace", 0.0) for fact in facts)
            return Quorum(
                generation=self._generation,
                rank=ids.index(self._id),
                members=ids,
                source=None if best and min(steps) == best else steps.index(best),
                roster=roster,
                outage=outage,
                cut_off=self._heart.silence() > CUT_OFF,
            )

    def _facts(self, step: int) -> dict[str, Any]:
        """What the other members are to know of this one."""
        # Whether there is nobody to wait for, who may come back with the run's state.
        nobody = step or not self._begun()
        return {
            "id": self._id,
            "formed": self._formed,
            "generation": self._generation,
            "joined": self._joined,
            "waited": SETTLE if nobody else self._question.answered,
            "together": self._together if self._question.answered < GATHER else 1,
            "back": self._heart.back < OLDEST,
            "links": self._links.seconds,
            "pace": max(self._gaps, default=0.0),
            "pid": os.getpid(),
            "host": self._host,
        }

    def _sit_out(self, out: str) -> None:
        """A member whose links are slow waits until they are quick; the others train without it.

        Raises:
            TryAgain: they do not become so.
        """
        self._links.forget()
        self._events.tell("outcast", out=out)
        if out != self._id:
            if self._id == next(id for id in self._stores if id != out):  # one tells it
                self._note(f"{out} sits out until data comes quickly from it")
            return
        self._note("sits out until data comes quickly from the others")
        self._phase(ASIDE)
        self._heart.stop()
        if time.monotonic() - self._back > MAX_REST:
            self._rest = 0.0
        self._waits.sleep(self._rest)
        self._rest = min(max(MIN_REST, 2 * self._rest), MAX_REST)
        others = [address for id, address in self._stores.items() if id != self._id]
        begun = time.monotonic()
        while time.monotonic() - begun < MAX_REST:
            self._heart.moved(GIVEN_UP * len(others))
            took = [seconds for address in others if (seconds := fetch(address)) is not None]
            if quick(took):
                self._question.forget_answers()
                self._back = time.monotonic()
                self._phase(QUORUM)
                return
            if not took:
                break
            self._waits.sleep(MIN_REST)
        # What it knows is old, and those who know better may all have died: the disk is newer.
        raise TryAgain("sat out, and the others are not to be reached")

    def _form(self, answer: Any, members: list[Any], ids: tuple[str, ...], generation: int) -> None:
        begun = time.monotonic()
        # The time of the vote, too: a coordinator that was started again counts from 1 again.
        key = f"{answer.quorum_id}-{answer.created.seconds}-{answer.created.nanos}"
        self._forget_keys(key)
        self._abort()
        if len(ids) > 1:
            store = f"{members[0].store_address}/{key}"
            self._connect(store, ids.index(self._id), len(ids))
        self._formed, self._members, self._generation = key, ids, generation
        self._joined = self._joined or generation
        self._fresh = True
        self._events.tell(
            "formed", generation=generation, members=ids, seconds=time.monotonic() - begun
        )

    def _connect(self, store: str, rank: int, count: int) -> None:
        """Form the process group; gloo would wait for one member after the other, for any time.

        Raises:
            TimeoutError: not in time. What waits still is left to itself.
        """
        group = self._make()
        done: queue.Queue[BaseException | None] = queue.Queue()

        def configure() -> None:
            try:
                group.configure(store, self._id, rank, count)
                done.put(None)
            except BaseException as error:
                done.put(error)

        begun = time.monotonic()

        def waiting() -> None:
            if time.monotonic() - begun > MIN_TIMEOUT:
                raise TimeoutError("not formed in time")

        threading.Thread(target=configure, daemon=True, name="form").start()
        self._waits.wait_for(done, waiting)
        self._pg = group

    def _forget_keys(self, key: str) -> None:
        """What groups before this one left in this member's store."""
        with suppress(RuntimeError):
            for name in self._store.list_keys():
                if key not in name and name != KEY:
                    self._store.delete_key(name)

    # Adding up

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the members, in place."""
        self.alive()
        if self._summed:
            self._gaps.append(time.monotonic() - self._summed)
        if len(self._members) > 1:
            self._doubt()
            options = AllreduceOptions()
            options.timeout = timedelta(seconds=self._timeout())
            begun = time.monotonic()
            self._do(tensor, options.timeout, lambda one: self._pg.allreduce([one], options))
            self._summing += time.monotonic() - begun
        self._handed = False
        self._summed = time.monotonic()
        if self._fresh:
            self._fresh = False
            self._events.tell("summed", generation=self._generation)

    def _doubt(self) -> None:
        """Give the update up where sums take longer than all else, and a slow link is the reason.

        Every sum may be in time, and an update take a minute instead of a second.
        """
        if self._summing < max(MIN_TIMEOUT, (time.monotonic() - self._agreed) / 2):
            return
        if not self._doubted:
            self._doubted = True
            self._check_links()
        elif slow(self._links.seconds.values()):
            self._give_up()
            raise MemberLost("a member's network is too slow")

    def _timeout(self) -> float:
        """Seconds after which a sum counts as failed: by the run's own pace.

        What a part of the optimisation takes here, it may take another some times over. Who has
        just come plays no slots yet, and is done at once: it waits by the pace of the others. Who
        has just been handed the state may have more to do before its first sum.
        """
        if self._handed:
            return STATE_TIMEOUT
        return sum_timeout(max(self._pace, *self._gaps, 0.0))

    def _do(self, tensor: Tensor, timeout: timedelta, collective: Callable[[Tensor], Any]) -> None:
        # Of a copy: what was given up may still be written to.
        there = tensor.to("cuda" if self._on_gpu else tensor.device, copy=True)
        self._heart.moved(timeout.total_seconds() + ABORT_TIMEOUT)
        try:
            if not collective(there).wait(timeout):
                raise RuntimeError("not done in time")
            if (failed := self._pg.errored()) is not None:  # NCCL's work is done when it is aborted
                raise failed
        except Exception as error:  # gloo's and NCCL's errors are RuntimeErrors of many texts
            self._give_up()
            raise MemberLost(f"a member was lost: {first_line(error)}") from error
        self._heart.moved()
        tensor.copy_(there)

    def _give_up(self) -> None:
        self._formed = ""
        self._check_links()
        self._abort()

    def _check_links(self) -> None:
        self._links.look({id: store for id, store in self._stores.items() if id != self._id})

    def _abort(self) -> None:
        """End the process group.

        One of gloo's may take as long as a sum may: its timeout counts anew whenever a late peer
        has moved the sum on. It is left to itself, as what it sums are copies. One of NCCL's holds
        the GPU: where that hangs, this member's life is the price.
        """
        if self._begin_abort().wait(ABORT_TIMEOUT) or not self._on_gpu:
            return
        self._note(f"NCCL's group did not end within {ABORT_TIMEOUT:g} s: this member begins anew")
        faulthandler.dump_traceback()
        os._exit(ExitCode.TRY_AGAIN)

    def _begin_abort(self) -> threading.Event:
        done, group = threading.Event(), self._pg

        def abort() -> None:
            with suppress(Exception):
                group.abort(errored=False)
            done.set()

        threading.Thread(target=abort, daemon=True, name="abort").start()
        return done

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
        self._handed = True
        length = torch.tensor([len(state)], dtype=torch.int64)
        options = BroadcastOptions()
        options.rootRank = quorum.source or 0
        options.rootTensor = 0
        options.timeout = timedelta(seconds=STATE_TIMEOUT)

        def broadcast(tensor: Tensor) -> None:
            self._do(tensor, options.timeout, lambda one: self._pg.broadcast([one], options))

        broadcast(length)
        content = torch.zeros(int(length.item()), dtype=torch.uint8)
        if state:
            content = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        options.timeout = timedelta(seconds=PIECE_TIMEOUT)
        for begin in range(0, len(content), PIECE):
            broadcast(content[begin : begin + PIECE])
        self._events.tell("synced", bytes=len(content), seconds=time.monotonic() - begun)
        return content.numpy().tobytes()

    def alive(self, patience: float = 0.0) -> None:
        """The loop moves, or waits for something that takes so many seconds at most.

        Raises:
            Leaving: the end of the update would be too late for a last checkpoint.
        """
        self._waits.alive(patience)

    def event(self, name: str, **facts: Any) -> None:
        """Write it down, if anybody measures."""
        self._events.tell(name, **facts)

    def close(self) -> None:
        """Leave: the others need not wait until it shows. There may be something left to save."""
        self._heart.stop()
        self._heart.moved(LAST_SAVE)
        if self._formed and len(self._members) > 1:
            self._begin_abort()


def _seniority(member: Any) -> tuple[float, str]:
    """Who has been in the group for longest comes first; then by name."""
    return member.data.get("joined") or math.inf, member.replica_id
