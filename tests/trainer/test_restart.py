"""What a supervisor decides, as tables."""

import signal

import pytest

from demoreset_api.errors import UserError
from demoreset_trainer.restart import (
    Ending,
    LastError,
    Limits,
    Record,
    ended,
    hang,
    last_error,
    stopped,
    words,
)

LIMITS = Limits(hang=10, start=300, grace=25, finish=15, jump=1)
NOW = 1000.0

# Of a member: exit code, update at which it ended, whether it brought one, the run's furthest
Death = tuple[int, int, bool, int]
KILLED, CRASH, AGAIN, DRAINED = -9, 1, 75, 143


def record(*deaths: Death, hung: bool = False) -> Record:
    result = Record()
    for code, update, brought, furthest in deaths:
        result = result.after(code, update=update, brought=brought, furthest=furthest, hung=hung)
    return result


def test_limits_are_told_by_the_environment() -> None:
    assert Limits.told({}) == Limits()
    told = Limits.told(
        {
            "DEMORESET_GRACE_SECONDS": "60",
            "DEMORESET_HANG_SECONDS": "2.5",
            "DEMORESET_START_SECONDS": "900",
        }
    )
    assert told == Limits(grace=48, hang=2.5, start=900)
    assert told.hurry == 24


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"DEMORESET_HANG_SECONDS: received '{text}'"):
        Limits.told({"DEMORESET_HANG_SECONDS": text})


@pytest.mark.parametrize(
    ("deaths", "wait"),
    [
        pytest.param([(CRASH, 0, False, 0)], 0, id="the first one at once"),
        pytest.param([(CRASH, 0, False, 0)] * 2, 1, id="then later"),
        pytest.param([(CRASH, 0, False, 0)] * 3, 2, id="and later"),
        pytest.param([(AGAIN, 0, False, 0)] * 6, 16, id="and later still"),
        pytest.param([(AGAIN, 0, False, 0)] * 2000, 30, id="never much later"),
        pytest.param([(KILLED, 7, True, 7)] * 3, 0, id="at once while it brings updates"),
        pytest.param(
            [(AGAIN, 0, False, 0)] * 9 + [(KILLED, 7, True, 7)], 0, id="at once after an update"
        ),
        pytest.param(
            [(KILLED, 7, True, 7), (CRASH, 0, False, 9)], 1, id="the updates of others do not count"
        ),
    ],
)
def test_how_long_until_the_next_one(deaths: list[Death], wait: float) -> None:
    assert record(*deaths).wait == wait


@pytest.mark.parametrize(
    ("deaths", "hopeless"),
    [
        ([(CRASH, 0, False, 0)] * 2, False),
        pytest.param([(CRASH, 0, False, 0)] * 3, True, id="never ready"),
        pytest.param([(CRASH, 7, True, 7)] * 3, True, id="always at the same update"),
        pytest.param([(KILLED, 7, True, 7)] * 3, True, id="memory, perhaps"),
        pytest.param(
            [(CRASH, 119, True, 119), (CRASH, 119, True, 119), (CRASH, 119, True, 119)],
            True,
            id="loaded from a checkpoint in between",
        ),
        pytest.param(
            [(CRASH, 7, True, 7), (CRASH, 7, False, 8), (CRASH, 7, False, 9)],
            False,
            id="the run comes on",
        ),
        pytest.param(
            [(KILLED, 9, True, 9), (KILLED, 7, True, 9), (KILLED, 8, True, 9)],
            False,
            id="at one update and at another: not the update's fault",
        ),
        pytest.param([(AGAIN, 0, False, 0)] * 50, False, id="storage is away"),
        pytest.param([(DRAINED, 7, False, 7)] * 50, False, id="somebody asks it to stop"),
        pytest.param(
            [(CRASH, 7, True, 7), (AGAIN, 7, False, 7), (CRASH, 7, True, 7)],
            False,
            id="two of ours",
        ),
    ],
)
def test_when_to_give_up(deaths: list[Death], hopeless: bool) -> None:
    assert record(*deaths).hopeless is hopeless


def test_three_that_hang_at_the_same_update_are_enough() -> None:
    assert record(*[(KILLED, 7, False, 7)] * 3, hung=True).hopeless


@pytest.mark.parametrize(
    ("started", "heard", "stopping", "why"),
    [
        (NOW - 299, None, False, None),
        (NOW - 301, None, False, "hung: not ready after 300 s"),
        (NOW - 301, NOW - 9, False, None),
        (NOW - 301, NOW - 11, False, "hung: no beat for 10 s"),
        (NOW - 301, NOW - 11, True, None),
        (NOW - 301, None, True, None),
    ],
)
def test_when_a_member_counts_as_hung(
    started: float, heard: float | None, stopping: bool, why: str | None
) -> None:
    assert hang(NOW, started=started, heard=heard, limits=LIMITS, stopping=stopping) == why


AT_ONCE, LATER = (NOW, NOW + 25), (NOW + 15, NOW + 40)


@pytest.mark.parametrize(
    ("before", "code", "after"),
    [
        (None, 0, Ending(0, *LATER)),
        (None, 2, Ending(2, *LATER)),
        (None, 64, Ending(64, *AT_ONCE)),
        (None, 65, Ending(65, *AT_ONCE)),
        (None, 66, Ending(66, *AT_ONCE)),
        (None, 1, None),
        (None, 75, None),
        (None, 143, None),
        (None, -9, None),
        (Ending(143, 990, 1015), 143, Ending(143, 990, 1015)),
        pytest.param(Ending(143, 990, 1015), 0, Ending(0, 990, 1015), id="met at the last moment"),
        (Ending(130, 990, 1015), 65, Ending(65, 990, 1015)),
        (Ending(0, 990, 1015), 64, Ending(0, 990, 1015)),
        (Ending(66, 990, 1015), 0, Ending(66, 990, 1015)),
    ],
)
def test_whether_the_run_ends_with_a_member(
    before: Ending | None, code: int, after: Ending | None
) -> None:
    assert ended(before, code, NOW, LIMITS) == after


@pytest.mark.parametrize(
    ("before", "number", "after"),
    [
        (None, signal.SIGTERM, Ending(143, *AT_ONCE)),
        (None, signal.SIGINT, Ending(130, *AT_ONCE)),
        pytest.param(
            Ending(130, 990, 1015), signal.SIGINT, Ending(130, 990, 1015), id="asked already"
        ),
        pytest.param(Ending(0, 1010, 1035), signal.SIGTERM, Ending(0, *AT_ONCE), id="hurry up"),
        pytest.param(Ending(66, 990, 1015), signal.SIGTERM, Ending(66, 990, 1015), id="failed"),
    ],
)
def test_what_a_signal_changes(before: Ending | None, number: int, after: Ending) -> None:
    assert stopped(before, number, NOW, LIMITS) == after


TRACEBACK = [
    "an earlier word",
    "Traceback (most recent call last):",
    '  File "loop.py", line 3, in <module>',
    "    step()",
    "KeyError: 'a'",
    "",
    "During handling of the above exception, another exception occurred:",
    "",
    "Traceback (most recent call last):",
    '  File "loop.py", line 5, in <module>',
    "torch.OutOfMemoryError: 7 GB: too much",
    "terminate called",
]


@pytest.mark.parametrize(
    ("lines", "code", "why", "said"),
    [
        (TRACEBACK, 1, None, "torch.OutOfMemoryError: 7 GB: too much"),
        (["Traceback (most recent call last):", "  x", "ValueError"], 1, None, "ValueError"),
        (["    step()", "KeyError: 'a'", "noise: 1"], 1, None, "KeyError: 'a'"),
        (["demoreset: spec.seed: received -1"], 64, None, "spec.seed: received -1"),
        (["demoreset: x", "noise"], 65, None, "x"),
        (["demoreset: x"], 66, None, "x"),
        (["demoreset: x"], 75, None, "x"),
        (["demoreset: x"], 1, None, "Crash: x"),
        ([], 1, None, "Crash: exit code 1"),
        (["noise"], 75, None, "exit code 75"),
        (TRACEBACK, -9, None, "killed by SIGKILL"),
        (["Fatal Python error: Segfault", ""], -11, None, "killed by SIGSEGV: Segfault"),
        (["terminate called", "  what():  no such"], -6, None, "killed by SIGABRT: no such"),
        (TRACEBACK, -9, "hung: no beat for 10 s", "hung: no beat for 10 s"),
    ],
)
def test_the_last_error(lines: list[str], code: int, why: str | None, said: str) -> None:
    error = last_error(lines, code, why)
    assert str(error) == said
    assert error.lines == tuple(lines)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (3, "exit code 3"),
        (-9, "killed by SIGKILL"),
        (-15, "killed by SIGTERM"),
        (-200, "killed by signal 200"),
    ],
)
def test_words(code: int, said: str) -> None:
    assert words(code) == said


@pytest.mark.parametrize(
    ("most", "report"),
    [
        (4096, b"E: m\none\ntwo \xe2\x82\xac"),
        (14, b"E: m\ntwo \xe2\x82\xac"),
        (11, b"E: m"),
        (3, b"E: "),
    ],
)
def test_a_report_has_the_error_and_as_many_last_lines_as_there_is_room_for(
    most: int, report: bytes
) -> None:
    assert LastError("E", "m", ("one", "two €")).report(most) == report


def test_a_report_is_never_half_a_letter() -> None:
    assert LastError("E", "€" * 9).report(8).decode() == "E: €"
