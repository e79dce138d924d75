"""The question for a quorum: it is asked until the coordinator answers, however often that dies."""

import itertools
import queue
import random
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any

from torchft.coordination import LighthouseClient

from demoreset_trainer.group import first_line
from demoreset_trainer.heart import ANSWERED, EVERY, Heart
from demoreset_trainer.waits import POLL, Waits

SLICE = 20.0  # seconds of one question; then it is asked again
BROKEN = 2.0  # seconds without an answered beat, after which no question is asked
KNOWN = 3 * EVERY  # seconds of answered beats, after which most who live have beaten as well
SILENT = "no beat is answered"
TOLD_AFTER = 10.0  # seconds of waiting until a person is told


class Question:
    """Asked at every update by one member.

    Args:
        url: Of the coordinator.
        heart: Beats under the name by which the question is asked.
        waits: How this member waits.
        note: Told what a person wants to know.
    """

    def __init__(self, url: str, heart: Heart, waits: Waits, note: Callable[[str], None]) -> None:
        self._url, self._heart, self._waits, self._note = url, heart, waits, note
        self._id, self._names = heart.name, itertools.count(2)
        self._asker = _Asker(url)
        self._answered: float | None = None  # since when the coordinator answers without a break
        self._away: float | None = None  # since when it does not
        self._told = self._told_away = False  # that this member waits; that the coordinator is away

    @property
    def answered(self) -> float:
        """Seconds for which the coordinator has answered without a break."""
        return time.monotonic() - self._answered if self._answered else 0.0

    def forget_answers(self) -> None:
        """This member has asked nothing for a while: what was heard before counts no more."""
        self._answered = None

    def ask(self, step: int, data: Callable[[], dict[str, Any]], **where: str) -> tuple[Any, float]:
        """The coordinator's answer, and for how many seconds it was away.

        Args:
            step: Orders the states that members have.
            data: What other members are to know, whenever it is asked.
            where: This member's `address` and `store_address`.

        Raises:
            Leaving: told to stop meanwhile.
        """
        begun = time.monotonic()
        self._away, self._told, self._told_away = None, False, False
        self._heart.start()
        pause = 0.05
        while True:
            asked = time.monotonic()
            try:
                self._reach()
                answer = self._waits.wait_for(
                    self._asker.ask(
                        self._heart.name,
                        timeout=timedelta(seconds=SLICE),
                        step=step,
                        world_size=1,
                        shrink_only=False,
                        data=data(),
                        **where,
                    ),
                    partial(self._waiting, begun, asked),
                )
            except TimeoutError:
                self._asker = self._asker.successor()
                continue
            except (RuntimeError, OSError) as error:
                self._give_up()
                self._answered = None
                self._pause(pause * (0.5 + random.random()), first_line(error))
                pause = min(2 * pause, 1.0)
                continue
            if self._heart.name not in {member.replica_id for member in answer.participants}:
                continue  # an answer to others: ask again
            self._answered = self._answered or time.monotonic()
            if self._told_away:
                self._note("the coordinator answers again")
            return answer, time.monotonic() - self._away if self._away else 0.0

    def _unanswered(self, why: str) -> None:
        self._away = self._away or time.monotonic()
        if not self._told_away and time.monotonic() - self._away > 1:
            self._told_away = True
            self._note(f"the coordinator at {self._url} does not answer ({why})")

    def _reach(self) -> None:
        """Beats have a new connection as soon as there can be one; a question's would wait.

        A connection that was cut off stands still for as long again after it was healed; what
        came through it then would be a quorum that is long over.

        Raises:
            ConnectionError: the coordinator cannot be reached.
        """
        if self._heart.unheard > BROKEN:
            raise ConnectionError(SILENT)

    def _pause(self, seconds: float, why: str) -> None:
        """Wait before it is asked again: for so long, or until a coordinator that was away is back.

        That one knows only who has beaten, and waits for no other: who asked at once would be
        grouped alone.
        """
        ends, away = time.monotonic() + seconds, False
        while away or time.monotonic() < ends:
            self._unanswered(why)
            away = away or not self._heart.heard
            if away and self._heart.heard > KNOWN:
                return
            self._waits.sleep(POLL)

    def _give_up(self) -> None:
        """Nobody will hear its answer, so it must not count as this member's.

        The coordinator keeps a question for as long as its member beats, or gets it late: TCP may
        send it again half a minute after a network was healed. It would make a group of it and of
        who has asked, and they would wait 5 s for a member that knows nothing. So this member
        beats, and asks, by another name from now on: a name without beats is soon out.
        """
        if self._asker.asked:
            self._asker = self._asker.successor()
            self._heart.name = f"{self._id}~{next(self._names)}"

    def _waiting(self, begun: float, asked: float) -> None:
        """Nothing has come yet.

        A question is not given up as soon as it was asked, though no beat was answered before: the
        coordinator may know of it, and the others would wait for who does not hear the answer. Nor
        while connections can be made: then the coordinator is frozen, and answers when it thaws.
        """
        if time.monotonic() - asked > BROKEN:
            if not self._heart.connects:
                self._reach()
            elif self._heart.unheard > BROKEN:
                self._unanswered(SILENT)
        if not self._told and time.monotonic() - begun > TOLD_AFTER:
            self._told = True
            self._note("waiting for the other members, or for enough of them")


class _Asker:
    """Asks in a thread of its own, so that the member can be told to stop meanwhile."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.asked = False
        self._client: LighthouseClient | None = None
        self._questions: queue.Queue[Any] = queue.Queue()
        Thread(target=self._run, daemon=True, name="quorum").start()

    def ask(self, id: str, **facts: Any) -> "queue.Queue[Any]":
        """Where the answer, or the error, will be."""
        answer: queue.Queue[Any] = queue.Queue()
        self.asked = True
        self._questions.put((answer, id, facts))
        return answer

    def successor(self) -> "_Asker":
        """One with a connection of its own; this one asks nothing more."""
        self._questions.put(None)
        return _Asker(self._url)

    def _run(self) -> None:
        while question := self._questions.get():
            answer, id, facts = question
            try:
                if self._client is None:
                    self._client = LighthouseClient(self._url, timedelta(seconds=ANSWERED))
                answer.put(self._client.quorum(id, **facts))
            except BaseException as error:
                answer.put(error)
                return  # who asks makes another one
