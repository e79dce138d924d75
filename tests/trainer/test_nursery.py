"""A nursery starts real processes, that are the test's own children and end as any others."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from demoreset_trainer.member_process import DEMORESET, MemberProcess
from demoreset_trainer.nursery import Nursery

PATIENCE = 60.0  # seconds until a test counts as stuck
FOR_EVER = ["coordinator", "--port", "0", "--host", "127.0.0.1"]  # until a signal comes


@pytest.fixture(scope="module")
def shared() -> Iterator[Nursery]:
    with Nursery(os.environ) as nursery:
        yield nursery


def start(nursery: Nursery, *arguments: str, **environment: str) -> MemberProcess:
    told = {**os.environ, **environment}
    return MemberProcess(0, "one", [*DEMORESET, *arguments], told, 0.0, nursery.spawn)


def until(met: Callable[[], object]) -> object:
    deadline = time.monotonic() + PATIENCE
    while not (result := met()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def ended(member: MemberProcess) -> int:
    until(lambda: member.ended() is not None)
    code = member.ended()
    assert code is not None
    return code


def listens(member: MemberProcess) -> Callable[[], bool]:
    def said() -> bool:
        member.said()
        alive = member.ended() is None  # asks the nursery, too, who was born
        return alive and any("coordinator on port" in one for one in member.tail)

    return said


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--version",), 0, "demoreset "),
        (("no-such-command",), 64, "no-such-command"),
        (("demo", "info", "nowhere"), 64, "nowhere"),
    ],
)
def test_a_member_ends_with_its_own_code_and_words(
    shared: Nursery, arguments: tuple[str, ...], code: int, says: str
) -> None:
    member = start(shared, *arguments)
    assert ended(member) == code
    member.said()
    assert says in "\n".join(member.tail)
    member.bury()


def test_a_member_is_our_child_and_tells_the_signal_that_ended_it(shared: Nursery) -> None:
    killed, asked = start(shared, *FOR_EVER), start(shared, *FOR_EVER)
    for member in (killed, asked):
        until(listens(member))
        parent = Path(f"/proc/{member.pid}/stat").read_text().rpartition(")")[2].split()[1]
        assert int(parent) == os.getpid()
    killed.kill()
    asked.ask()
    assert ended(killed) == -signal.SIGKILL
    assert ended(asked) == 143
    for member in (killed, asked):
        member.bury()


def test_a_member_has_an_environment_of_its_own(shared: Nursery, tmp_path: Path) -> None:
    member = start(shared, *FOR_EVER, SOMETHING="else")
    until(listens(member))
    # What a forked process sets later is not in /proc: its children inherit it.
    assert b"SOMETHING" not in Path(f"/proc/{member.pid}/environ").read_bytes()
    member.bury()
    told = start(shared, "demo", "verify", "freeway-crossing", DEMORESET_CACHE=str(tmp_path))
    assert ended(told) == 0
    told.bury()


def test_a_machine_that_has_no_room_for_a_member_leaves_no_pipe_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_room(*_: object) -> NoReturn:
        raise OSError(errno.EAGAIN, "no room")

    pipe, made = os.pipe, list[int]()

    def second_fails() -> tuple[int, int]:
        if made:
            raise OSError(errno.EMFILE, "too many")
        made.extend(pipe())
        return made[0], made[1]

    before = os.listdir("/proc/self/fd")
    for fails in (pipe, second_fails):
        monkeypatch.setattr(os, "pipe", fails)
        with pytest.raises(OSError, match=r"no room|too many"):
            MemberProcess(0, "one", [], {}, 0.0, no_room)
    assert os.listdir("/proc/self/fd") == before


def test_members_outlive_their_nursery_and_the_next_one_comes_from_another() -> None:
    with Nursery(os.environ) as nursery:
        first = start(nursery, *FOR_EVER)
        until(listens(first))
        group = os.getpgid(first.pid)  # that of the nursery, which leads it
        os.kill(group, signal.SIGKILL)
        second = start(nursery, *FOR_EVER)
        until(lambda: second.ended() is not None or listens(second)())
        if second.ended() is not None:  # asked for before the loss was noticed: asked again
            assert second.ended() == 75
            second.bury()
            second = start(nursery, *FOR_EVER)
            until(listens(second))
        assert first.ended() is None
        assert os.getpgid(second.pid) != group
        for member in (first, second):
            member.kill()
            assert ended(member) == -signal.SIGKILL
            member.bury()


def test_one_that_is_to_end_before_it_is_born_never_was() -> None:
    with Nursery(os.environ) as nursery:
        member = start(nursery, *FOR_EVER)  # the nursery imports still
        member.ask()
        assert ended(member) == -signal.SIGTERM
        assert member.pid == 0
        member.bury()


def test_nobody_is_left_when_it_closes() -> None:
    before = children()
    with Nursery(os.environ) as nursery:
        start(nursery, "--version").bury()
    assert children() <= before


def children() -> set[int]:
    """Our own, also those that have ended and that nobody has asked for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def test_numbers_of_dead_strangers_are_not_kept(shared: Nursery) -> None:
    member = start(shared, *FOR_EVER)
    until(listens(member))
    shared._early[member.pid or 0] = 0  # as of a process of a member that died meanwhile
    shared.look()
    assert not shared._early
    member.kill()
    assert ended(member) == -signal.SIGKILL
