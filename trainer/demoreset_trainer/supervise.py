"""The processes around members: starts them, listens to them, starts again what was lost.

One thread and one loop, for members must be started by a thread that stays. What is decided is in
`restart`; what is told goes to whoever watches.
"""

import math
import os
import secrets
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from demoreset_api.errors import ExitCode
from demoreset_api.names import ASIDE, CONFIRM, ENV_CORES, OUT_OF_MEMORY, STARTING
from demoreset_trainer import restart
from demoreset_trainer.machine import cores_each, devices, oom_kills
from demoreset_trainer.member_process import SETTINGS, MemberProcess, Spawn, popen
from demoreset_trainer.progress import Progress
from demoreset_trainer.progress import Watch as LoopWatch
from demoreset_trainer.restart import Ending, LastError, Limits, Record
from demoreset_trainer.wire import Beat, Note

TURN = 0.05  # seconds between two looks at the members, at most
# Ends of a member that was asked to stop, perhaps before it could listen.
WELL = (*restart.OVER, ExitCode.DRAINED, -signal.SIGTERM)
DUMP = 1.0  # seconds that a hung member has to say where it stands
OOM_LOOK = 1.0  # seconds between two looks at what the kernel has killed for memory
OOM_RECENT = 10.0  # seconds after it for which that is why a member ends
STARVED = "the kernel has killed a process of this worker: its memory limit is not enough"
MAX_NOTES = 1000  # remembered, so as not to tell them twice


class Watch(LoopWatch, Protocol):
    """Who wants to know; `watch.Watchers` is one."""

    def states(self, states: Mapping[str, str]) -> None:
        """How the members of this supervisor are, by their ids."""


class _Place:
    """Where one member follows another."""

    def __init__(self) -> None:
        self.member: MemberProcess | None = None
        self.record = Record()
        self.start_at = float("-inf")
        self.lost: str | None = None  # id of the one that was here, until the next is started


class Supervisor:
    """Keeps a number of members running until the run ends.

    Args:
        name: The worker's; its members are called after it, and every new one otherwise, for a
            quorum knows them by their ids.
        members: How many.
        command: What to run for a place and an id.
        watch: Told of everything.
        stopping: The signal that asked us to stop, None before.
        say: Takes the lines that members write, on whatever stream.
        environment: Of the members, before each has its share of the machine.
        limits: How long to wait for what.
        spawn: Starts a member.
        tend: Called at every turn with the time, for what else must be kept running.
        keep: Keeps where a member stood that did not go on; says under which name.
        brief: That is then not said as well: it would fill a screen.
        starved: How many processes of this container the kernel has killed for its memory.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        members: int,
        command: Callable[[int, str], Sequence[str]],
        watch: Watch,
        *,
        stopping: Callable[[], int | None],
        say: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        spawn: Spawn = popen,
        tend: Callable[[float], None] | None = None,
        keep: Callable[[str, Sequence[str]], str] | None = None,
        brief: bool = False,
        starved: Callable[[], int] = oom_kills,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._command, self._watch = name, command, watch
        self._stopping, self._say, self._tend, self._clock = stopping, say, tend, clock
        self._spawn, self._starved, self._keep, self._brief = spawn, starved, keep, brief
        self._oom_kills, self._oom_looked, self._oom_at = starved(), clock(), -math.inf
        self._limits = limits or Limits()
        base = dict(os.environ if environment is None else environment)
        self._environments = [share(base, index, members) for index in range(members)]
        self._places = [_Place() for _ in range(members)]
        self._ending: Ending | None = None
        self._turned = clock()
        self._notes: dict[tuple[int, str], str] = {}  # who told it first
        self._states: dict[str, str] = {}
        self._generation: int | None = None
        self.progress: Progress | None = None  # the latest
        self.furthest = 0  # update that the run has ever reached
        self.updates_lost = 0  # done, and lost with all who knew of them
        self.error: LastError | None = None  # the latest that ended a member

    @property
    def life(self) -> int:
        """The latest life in which a member of this group trained; 0: none has."""
        return self.progress.life if self.progress is not None else 0

    @property
    def members(self) -> list[MemberProcess]:
        """Those that live."""
        return [place.member for place in self._places if place.member is not None]

    def run(self) -> int:
        """Until the run ends; the exit code (`demoreset_api.errors.ExitCode`)."""
        try:
            while True:
                now = self._clock()
                self._forgive(now)
                self._turn(now)
                if self._ending is not None and not self.members:
                    return self._ending.code
                self._wait()
        finally:
            for member in self.members:
                member.bury()

    def _wait(self) -> None:
        """Until somebody tells something, or it is time to look again."""
        poll = select.poll()
        for member in self.members:
            for descriptor in member.descriptors:
                poll.register(descriptor, select.POLLIN)
        poll.poll(TURN * 1000)

    def _forgive(self, now: float) -> None:
        """After we were frozen ourselves nobody is late: all of them may have been frozen, too."""
        missed = now - self._turned
        self._turned = now
        if missed <= self._limits.jump:
            return
        for member in self.members:
            member.forgive(now)
        if self._ending is not None:
            self._ending = self._ending.later(missed)

    def _look_for_oom(self, now: float) -> None:
        """See when the kernel has last killed a process for memory: maybe none of ours."""
        if (killed := self._starved()) > self._oom_kills:
            self._oom_kills, self._oom_at = killed, now
        self._oom_looked = now

    def _turn(self, now: float) -> None:
        if (number := self._stopping()) is not None:
            self._ending = restart.stopped(self._ending, number, now, self._limits)
        for place in self._places:
            if (member := place.member) is not None:
                code = member.ended()  # first: what it told before is read below
                self._hear(member, now)
                if code is not None:
                    self._lose(place, member, code, now)
        if now - self._oom_looked > OOM_LOOK:
            self._look_for_oom(now)
        self._end_the_hung(now)
        if self._ending is not None:
            self._end(self._ending, now)
        else:
            self._fill(now)
        self._tell_states()
        if self._tend is not None:
            self._tend(now)

    # Listening

    def _hear(self, member: MemberProcess, now: float) -> None:
        lines = member.said()
        for text in lines if member.hung is None or not self._brief else ():
            self._say(f"[{member.name}] {text}")
        for message in member.listen(now):
            match message:
                case Beat():
                    self._watch.phase(self._phase())
                case Note():
                    self._note(member, message)
                case Progress():
                    self._progressed(message)

    def _phase(self) -> str:
        """Of the group's first member that is ours; but who confirms keeps the others waiting."""
        ranked = [
            (member.progress.rank, member.index, member.phase)
            for member in self.members
            if member.progress is not None and member.phase != ASIDE
        ]
        phases = [phase for _, _, phase in sorted(ranked)]
        if not phases:
            return ASIDE if {member.phase for member in self.members} == {ASIDE} else STARTING
        return CONFIRM if CONFIRM in phases else phases[0]

    def _note(self, member: MemberProcess, note: Note) -> None:
        """Tell it once, whoever of the group says it."""
        teller = self._notes.setdefault((note.update, note.text), member.name)
        if len(self._notes) > MAX_NOTES:
            del self._notes[next(iter(self._notes))]
        if teller == member.name:
            self._watch.note(note.text)

    def _progressed(self, progress: Progress) -> None:
        """Tell of an update, in the words of our first member in the group."""
        before = self.progress
        latest = before.update if before is not None else None
        if before is not None and progress.life > before.life:
            # It goes back where it was read from the disk: all that knew its state were lost.
            if (lost := before.update - progress.update + 1) > 0:
                self.updates_lost += lost
                were = "was" if lost == 1 else "were"
                self._watch.note(
                    f"back at update {progress.update - 1}: {lost} {were} lost with all members"
                )
            self._generation, latest = None, None
        elif before is not None and progress.life < before.life:
            return  # the last words of somebody whom the others left behind
        self.furthest = max(self.furthest, progress.update)
        if any(
            other.progress.rank < progress.rank
            for other in self.members
            if other.progress is not None and other.progress.generation == progress.generation
        ):
            return
        if latest is not None and progress.update <= latest:
            if progress.update == latest and progress.rank == 0:
                self.progress = progress
                self._watch.update(progress)  # the first's own words, for the file
            return
        if progress.generation != self._generation:
            self._generation = progress.generation
            count = f"{progress.members} member{'s' if progress.members > 1 else ''}"
            self._watch.note(
                f"generation {progress.generation}: {count}, at update {progress.update}"
            )
        self.progress = progress
        self._watch.update(progress)

    # Losing and starting

    def _lose(self, place: _Place, member: MemberProcess, code: int, now: float) -> None:
        """A member has ended: what was it, and what follows."""
        place.member, place.lost = None, member.name
        member.bury()
        if member.stacks and self._keep is not None:
            kept = self._keep(member.name, member.stacks)
            self._watch.note(f"member {member.name} stood still: where, is in {kept}")
        ending = restart.ended(self._ending, code, now, self._limits)
        if ending is not None:
            if self._ending is None or ending.code != self._ending.code:
                self.error = member.error(code)
            elif code not in WELL:
                self._watch.note(
                    f"member {member.name} (pid {member.pid}) did not stop well: "
                    f"{restart.words(code)}"
                )
            self._ending = ending
            return
        self.error = error = member.error(code)
        self._look_for_oom(now)
        starved = now - self._oom_at < OOM_RECENT
        if starved:  # whatever it says: the kernel may have killed what it needed
            code = -signal.SIGKILL
            self.error = error = LastError(OUT_OF_MEMORY, STARVED, error.lines)
            self._oom_at = -math.inf  # it explains one end
        # Who has done none was to go on where the run stands now.
        stands = self.progress.update if self.progress is not None else self.furthest
        update = member.told or stands
        # One that hung before it had the run's state was held up by the volume, or by the others.
        waited = member.hung is not None and member.waits
        # SIGKILL is the kernel's, for memory, or ours, for one that hung; else it was no fault.
        shot = code == -signal.SIGKILL and not starved and member.hung is None
        place.record = place.record.after(
            ExitCode.TRY_AGAIN if waited or shot else code,
            update=update,
            brought=member.progress is not None,
            furthest=self.furthest,
            hung=member.hung is not None and not waited,
        )
        self._watch.phase(self._phase())
        if place.record.hopeless:
            times = f"update {update + 1} failed {place.record.deaths} times"
            if not starved:
                self.error = LastError("NoProgress", f"{times}; the last: {error}", error.lines)
            final = ExitCode.OUT_OF_MEMORY if starved else ExitCode.NO_PROGRESS
            self._ending = Ending(final, now, now + self._limits.grace)
            then = "not again: it failed so often at the same update"
        else:
            place.start_at = now + place.record.wait
            wait = place.record.wait
            then = f"starting it again in {wait:g} s" if wait else "starting it again"
        how, said = member.hung or str(error), restart.words(code)
        if member.hung is None and code > 0:
            how = said if error.message == said else f"{said} ({error})"
        self._watch.note(
            f"lost member {member.name} (pid {member.pid}) at update {update}: {how}; {then}"
        )

    def _end_the_hung(self, now: float) -> None:
        for member in self.members:
            why = restart.hang(
                now,
                started=member.started,
                heard=member.heard,
                limits=self._limits,
                stopping=self._ending is not None,
            )
            if why is not None and member.hung is None:
                member.hung, member.kill_at = why, now + DUMP
                member.abort()
            elif member.kill_at is not None and now >= member.kill_at:
                member.kill()

    def _end(self, ending: Ending, now: float) -> None:
        """Ask those that are left to stop; kill them when their time is over."""
        for member in self.members:
            if now >= ending.kill_at:
                member.kill()
            elif now >= ending.ask_at and not member.asked:
                if member.stands_still(now):
                    member.ask_where()
                member.ask()

    def _fill(self, now: float) -> None:
        """Start a member wherever there is none and it is time."""
        for index, place in enumerate(self._places):
            if place.member is not None or now < place.start_at:
                continue
            name = f"{self._name}-{index}-{secrets.token_hex(4)}"
            try:
                place.member = MemberProcess(
                    index,
                    name,
                    self._command(index, name),
                    self._environments[index],
                    now,
                    self._spawn,
                )
            except OSError as error:
                place.record = place.record.after(
                    ExitCode.TRY_AGAIN,
                    update=place.record.update or 0,
                    brought=False,
                    furthest=self.furthest,
                )
                wait = max(1.0, place.record.wait)
                place.start_at = now + wait
                self._watch.note(
                    f"member {index} cannot be started: {error}; trying again in {wait:g} s"
                )
            else:
                place.lost = None

    def _tell_states(self) -> None:
        states = {place.lost: "lost" for place in self._places if place.lost is not None}
        for member in self.members:
            if member.asked:
                states[member.name] = "stopping"
            elif member.phase == ASIDE:
                states[member.name] = ASIDE
            else:
                states[member.name] = "training" if member.progress is not None else STARTING
        if states != self._states:
            self._states = states
            self._watch.states(states)


# What each has of the machine


def share(environment: Mapping[str, str], index: int, members: int) -> dict[str, str]:
    """The environment of a member: its cores, and its GPU where there are any."""
    its = {**SETTINGS, **environment, ENV_CORES: str(cores_each(members, environment))}
    if found := devices(environment):
        its["CUDA_VISIBLE_DEVICES"] = found[index % len(found)]
    return its
