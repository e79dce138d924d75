"""Who was lost together with the coordinator may train on elsewhere, and is kept from saving."""

import pytest

from demoreset_api.errors import TryAgain
from demoreset_trainer import fence
from demoreset_trainer.fence import Fence
from demoreset_trainer.group import Quorum


class Around:
    """A fence of member "a", which has trained with "b" and "c"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.taken: list[int | TryAgain | None] = []  # what taking a life brings, call by call
        self.calls = 0
        self.notes: list[str] = []
        self.fence = Fence(self._take, self.notes.append)

    def _take(self) -> int | None:
        self.calls += 1
        brought = self.taken.pop(0)
        if isinstance(brought, TryAgain):
            raise brought
        return brought

    def agree(self, members: str, *, cut_off: bool = False, expected: str = "abc") -> None:
        self.fence.lose(Quorum(1, 0, tuple(members), cut_off=cut_off), list(expected))
        self.fence.build(first=members[0] == "a")

    @property
    def life(self) -> int:
        return self.fence.life

    def later(self) -> None:
        self.now += fence.PATIENCE + 1


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Around:
    return Around(monkeypatch)


def test_a_life_is_taken_once_those_who_are_missing_have_had_their_time(around: Around) -> None:
    around.taken = [None, None, 2]
    around.agree("ab", cut_off=True)
    around.agree("ab")
    assert not around.calls, "c may only be slower"
    around.later()
    for _ in range(3):
        assert around.life == 0, "the disk takes its time"
        around.agree("ab", expected="ab")
    assert around.life == 2
    around.later()
    around.agree("ab", expected="ab")
    assert around.life == 2, "until all are in it"
    around.fence.stands()
    around.agree("ab", expected="ab")
    assert (around.life, around.calls) == (0, 3)


def test_who_comes_later_than_another_hides_nobody(around: Around) -> None:
    around.taken = [2]
    around.agree("a", cut_off=True)
    around.agree("ab", expected="a")
    around.later()
    around.agree("ab", expected="ab")
    assert around.life == 2


@pytest.mark.parametrize(
    ("quorums", "why"),
    [
        ([("ab", False), ("ab", False)], "the coordinator was there: c is dead"),
        ([("ab", True), ("abc", False)], "c was only slower"),
        ([("ca", True), ("ca", False)], "it falls to the first"),
    ],
)
def test_no_life_is_taken(around: Around, quorums: list[tuple[str, bool]], why: str) -> None:
    for members, cut_off in quorums:
        around.agree(members, cut_off=cut_off)
    around.later()
    around.agree(quorums[-1][0])
    assert not around.calls, why


def test_one_that_is_being_taken_is_waited_for_whoever_comes_back(around: Around) -> None:
    around.taken = [None, 2]
    around.agree("ab", cut_off=True)
    around.later()
    around.agree("ab")
    around.agree("abc")
    assert around.life == 2


def test_a_disk_that_is_away_is_tried_again_and_told_of_once(around: Around) -> None:
    around.taken = [TryAgain("away"), TryAgain("away"), 3]
    around.agree("ab", cut_off=True)
    for _ in range(3):
        around.later()
        around.agree("ab", expected="ab")
        around.agree("ab", expected="ab")  # not at every update
    assert around.life == 3
    assert around.notes == ["others may train this run, too, and could not be fenced off: away"]
