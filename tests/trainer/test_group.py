"""Any number of members learn the same; whoever dies, whenever: no update is lost or half done."""

import itertools
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from demoreset_api.errors import TryAgain
from demoreset_trainer import fence
from demoreset_trainer.checkpoint import pack, unpack
from demoreset_trainer.curriculum import Result
from demoreset_trainer.demo import Demo, record
from demoreset_trainer.group import deal
from demoreset_trainer.loop import Loop
from demoreset_trainer.rollout import Collector
from demoreset_trainer.slots import Begin
from demoreset_trainer.streams import seed_from, stream
from small_run import Diary, Shelf, make, weights
from town import Citizen, Dead, Town

names = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)


@pytest.fixture(scope="module")
def crossing() -> Demo:
    return record("freeway", np.full(172, 2, np.uint8), frame_skip=4)


# Dealing


@given(names, names, st.integers(1, 40))
def test_slots_are_shared_out_and_few_change_hands(
    before: list[str], after: list[str], slots: int
) -> None:
    owners = deal([""] * slots, before)
    dealt = deal(owners, after)
    share, extra = divmod(slots, len(after))
    assert set(dealt) <= set(after)
    assert sorted(Counter(dealt)[one] for one in after) == sorted(
        share + (place < extra) for place in range(len(after))
    )
    # No other way of equal shares lets more slots stay where they are.
    held = [Counter(owners)[one] for one in after]
    most = sum(min(count, share) for count in held)
    most += min(extra, sum(count > share for count in held))
    assert sum(a == b for a, b in zip(owners, dealt, strict=True)) == most
    assert deal(dealt, after) == dealt


# Several members


class Story:
    """Runs members in threads until all of them ended; what each committed."""

    def __init__(self, demo: Demo) -> None:
        self._demo = demo
        self.town = Town()
        self.loops: dict[str, Loop] = {}
        self.diaries: dict[str, Diary] = {}
        self.citizens: dict[str, Citizen] = {}
        self._threads: list[threading.Thread] = []
        self.failed: list[BaseException] = []
        self.shelves: dict[str, Shelf] = {}
        self._lives = itertools.count(1)  # nothing is on the disk: who looks there begins anew

    def start(
        self,
        id: str,
        *,
        until: int,
        doom: Callable[[str, int], bool] = lambda what, count: False,
        asked: Callable[[], bool] = lambda: False,
        teaches: Demo | None = None,
        **changes: dict[str, Any],
    ) -> None:
        citizen = self.town.enter(id)
        citizen.doom = doom
        loop, diary, shelf = make(
            teaches or self._demo,
            group=citizen,
            find=lambda: (next(self._lives), None),
            **changes,
        )
        self.loops[id], self.citizens[id], self.diaries[id] = loop, citizen, diary
        self.shelves[id] = shelf

        def body() -> None:
            try:
                # Who leaves says so at the update before.
                loop.run(lambda: asked() or loop.state.counters.update >= until - 1)
            except Dead:
                return
            except BaseException as error:
                self.failed.append(error)
            self.town.leave(id)

        thread = threading.Thread(target=body, name=id, daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self, id: str, updates: int) -> None:
        """Until one has committed so many."""
        deadline = time.monotonic() + 60
        while len(self.citizens[id].commits) < updates:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), thread.name
        if self.failed:
            raise self.failed[0]

    def check(self, slots: int = 8) -> None:
        """Frames never jump or repeat, and at the same update all have the same state.

        Where all that knew the run's state have died, another life begins anew.
        """
        lives: dict[int, dict[int, set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
        for citizen in self.citizens.values():
            order = [(life, update) for life, update, _, _ in citizen.commits]
            assert order == sorted(set(order))
            for life, update, frames, digest in citizen.commits:
                lives[life][update].add((frames, digest))
        for states in lives.values():
            assert all(len(known) == 1 for known in states.values()), states
            assert sorted(states) == list(range(1, max(states) + 1))
            committed = [known.pop()[0] for _, known in sorted(states.items())]
            steps = np.diff([0, *committed])
            assert (steps > 0).all()
            assert (steps <= slots * 8 * 4).all()


@pytest.mark.parametrize("members", [2, 3])
def test_any_number_of_members_learns_the_same(crossing: Demo, members: int) -> None:
    alone, _, _ = make(crossing)
    begun = weights(alone).clone()
    alone.run(lambda: alone.state.counters.update >= 3)
    story = Story(crossing)
    with story.town.condition:  # all are there before the first vote
        for number in range(members):
            story.start(f"m{number}", until=3)
    story.end()
    story.check()
    for loop in story.loops.values():
        assert loop.state.counters.frames == alone.state.counters.frames == 3 * 8 * 8 * 4
        assert loop.state.counters.episodes == alone.state.counters.episodes
        assert loop.state.curriculum.state() == alone.state.curriculum.state()
        assert loop.state.goal.state() == alone.state.goal.state()
        assert loop.state.episodes.tolist() == alone.state.episodes.tolist()
        # The order of the sums makes a gradient that is all but zero point the other way, and
        # Adam takes its sign for its size: few weights differ, together by little.
        apart, moved = (weights(loop) - weights(alone)).norm(), (weights(alone) - begun).norm()
        assert apart < 0.1 * moved


def come_and_go(story: Story, each: Callable[[], object] = lambda: None) -> None:
    """1, then 3, then 2: those who leave do so between updates, so every share is learned from."""
    joined = threading.Event()

    def bring(what: str, update: int) -> bool:
        if what == "commit":
            each()
        if what == "commit" and update == 2 and not joined.is_set():
            joined.set()
            story.start("b", until=5)
            story.start("c", until=8)
        return False

    story.start("a", until=8, doom=bring)
    story.end()
    story.check()


def test_members_come_and_go_and_no_frame_is_lost(crossing: Demo) -> None:
    story = Story(crossing)
    come_and_go(story)
    assert story.loops["a"].state.counters.frames == 8 * 8 * 8 * 4
    assert story.loops["a"].state.counters.frames_discarded == 0
    assert weights(story.loops["a"]).equal(weights(story.loops["c"]))
    # Who has joined counts as the others do, so that a total never falls when another one tells it.
    counted = [story.loops[id].state.counters.recoveries for id in "ac"]
    assert counted[0] == counted[1]
    assert {"joined", "left"} <= set(counted[0])
    assert [update for _, update, _, _ in story.citizens["b"].commits][-1] == 5


def test_what_an_episode_is_follows_from_its_numbers_and_the_table_whoever_plays_it(
    crossing: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = Story(crossing)
    begun: list[tuple[str, int, int, str, Begin]] = []  # by whom; slot, episode, table; what
    ended: list[Result] = []
    begin = Collector._begin

    def watched(self: Collector, column: int, episode: int) -> Begin:
        planned, member = begin(self, column, episode), threading.current_thread().name
        table = json.dumps(story.loops[member].state.curriculum.state())
        begun.append((member, int(self.held[column]), episode, table, planned))
        return planned

    with monkeypatch.context() as watch:
        watch.setattr(Collector, "_begin", watched)
        come_and_go(story, lambda: ended.extend(story.loops["a"]._results))
    # One that has never met the others, nor held a slot, says the same of every episode.
    other, _, _ = make(crossing)
    for _, slot, episode, table, planned in begun:
        other.state.curriculum.load(json.loads(table))
        random = stream(other.spec.seed, slot, episode)
        start = other._choose(slot, episode, random)
        assert planned == Begin(start.frame, seed_from(random), start.limits)
    assert {member for member, *_ in begun} == set("abc")
    players = {slot: {member for member, of, *_ in begun if of == slot} for slot in range(8)}
    assert any(len(members) > 1 for members in players.values())  # slots have changed hands
    # No number is played twice, and each from where it was to begin.
    numbers = [(result.slot, result.episode) for result in ended]
    assert len(set(numbers)) == len(numbers) > 0
    starts = {(slot, episode, planned.start) for _, slot, episode, _, planned in begun}
    assert {(result.slot, result.episode, result.start) for result in ended} <= starts


def test_what_a_member_waits_for_is_no_loss_of_the_others(crossing: Demo) -> None:
    """Who comes while the others play waits for them; a total never falls when it tells it."""
    story = Story(crossing)

    def wait(what: str, update: int) -> bool:
        if what == "commit" and update == 2:
            story.start("b", until=5)
            time.sleep(3)
        return False

    story.start("a", until=5, doom=wait)
    story.end()
    counted = [story.loops[id].state.counters for id in "ab"]
    assert [counters.recoveries for counters in counted] == [{"joined": 1}] * 2
    spent = [counters.recovery_seconds["joined"] for counters in counted]
    assert abs(spent[0] - spent[1]) < 1
    assert abs(counted[0].seconds - counted[1].seconds) < 1


@pytest.mark.parametrize("moment", [("gather", 0), ("sum", 1), ("sum", 4), ("quorum", 0)])
@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_member_that_dies_costs_its_share_of_one_update(
    crossing: Demo, moment: tuple[str, int], victim: str
) -> None:
    story = Story(crossing)
    with story.town.condition:
        for id in "abc":

            def doom(what: str, count: int, id: str = id) -> bool:
                loop = story.loops.get(id)
                late = loop is not None and loop.state.counters.update == 2
                return id == victim and late and (what, count) == moment

            story.start(id, until=5, doom=doom)
    story.end()
    story.check()
    first, second = (loop for id, loop in story.loops.items() if id != victim)
    assert weights(first).equal(weights(second))
    assert first.state.counters.update == second.state.counters.update == 5
    share = 3 * 8 * 4
    assert first.state.counters.frames + first.state.counters.frames_discarded == 5 * 8 * 8 * 4
    assert first.state.counters.frames_discarded <= share
    assert set(first.state.owners) == set(story.loops) - {victim}


@dataclass(frozen=True)
class Deed:
    """What befalls one of the members that live then, at a place in an update or a later one.

    which: of them, by seniority. nth: of an update's sums.
    """

    update: int
    which: int
    what: str  # join: another one comes
    place: str = "gather"
    nth: int = 0

    def strikes(self, place: str, count: int) -> bool:
        return place == self.place and (place != "sum" or count == 1 + self.nth)


MOST = 4  # members at a time
deeds = st.builds(
    Deed,
    update=st.integers(0, 6),
    which=st.integers(0, MOST - 1),
    what=st.sampled_from(["join", "leave", "kill"]),
    place=st.sampled_from(["gather", "quorum", "sum", "commit"]),
    nth=st.integers(0, 8),
)


@settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(2, [Deed(1, 1, "kill"), Deed(2, 0, "kill", "quorum")])  # all who knew it die
@example(1, [Deed(1, 0, "join"), Deed(1, 0, "join"), Deed(3, 0, "kill"), Deed(3, 1, "leave")])
@example(4, [Deed(1, 3, "kill", "sum", 4), Deed(1, 1, "kill", "sum", 4), Deed(1, 1, "leave")])
@given(st.integers(1, MOST), st.lists(deeds, min_size=1, max_size=6))
def test_whoever_comes_leaves_or_dies_the_others_agree(
    crossing: Demo, members: int, schedule: list[Deed]
) -> None:
    """Where the last one goes another one comes, and begins anew unless it was told in time."""
    story = Story(crossing)
    left = sorted(schedule, key=lambda deed: deed.update, reverse=True)
    going: set[str] = set()  # dead, or told to leave
    born = itertools.count()

    def start() -> None:
        id = f"m{next(born)}"

        def doom(place: str, count: int) -> bool:
            with story.town.condition:  # one deed at a time
                staying = [one for one in story.town.living if one not in going]
                if not left or id not in staying or id not in story.loops:
                    return False
                deed, update = left[-1], story.loops[id].state.counters.update
                if staying[deed.which % len(staying)] != id or update < deed.update:
                    return False
                if not deed.strikes(place, count):
                    return False
                left.pop()
                if deed.what != "join":
                    going.add(id)
                if len(staying) < MOST if deed.what == "join" else len(staying) == 1:
                    start()
                return deed.what == "kill"

        def asked() -> bool:
            return id in going

        story.start(id, until=8, doom=doom, asked=asked, environment={"slots": 4})

    with story.town.condition:
        for _ in range(members):
            start()
    story.end()
    story.check(slots=4)
    notes = [note for diary in story.diaries.values() for note in diary.notes]
    assert not [note for note in notes if "differ" in note]  # by all that must be the same


def test_a_state_goes_to_another_member_as_it_is(crossing: Demo) -> None:
    loop, _, _ = make(crossing)
    loop.run(lambda: loop.state.counters.update >= 2)
    snapshot, extra = unpack(pack(loop.snapshot(), {"owners": ["a", "b"]}))
    assert extra == {"owners": ["a", "b"]}
    assert snapshot.state == loop.snapshot().state
    assert (snapshot.life, snapshot.update) == (1, 2)
    for name, tensor in loop.snapshot().model.items():
        assert torch.equal(tensor, snapshot.model[name])
    for name, tensor in loop.snapshot().optimizer.items():
        assert torch.equal(tensor, snapshot.optimizer[name])


# What is wrong with one is the business of all


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ppo": {"epochs": 1}}, "spec.ppo.epochs = 2, this one 1"),
        ({"curriculum": {"memory": 0.5}}, r"spec.curriculum.memory = 0.93, this one 0.5"),
        ({"goal": {"successRate": 0.5}}, "spec.goal.successRate = 0.9, this one 0.5"),
        ({}, "spec.demo.sha256 = "),
    ],
    ids=["ppo", "curriculum", "goal", "demo"],
)
def test_who_was_given_another_run_file_is_told_so_and_costs_the_others_nothing(
    crossing: Demo, changes: dict[str, Any], said: str
) -> None:
    story = Story(crossing)
    story.start("a", until=6)
    story.wait("a", 2)
    story.start("b", until=6, teaches=crossing if changes else crossing.prefix(168), **changes)
    with pytest.raises(TryAgain, match=f"other members of this group have {said}"):
        story.end()
    story.check()
    assert len(story.citizens["a"].commits) >= 5
    assert not story.citizens["b"].commits


def test_who_differs_however_often_it_is_made_equal_gives_up_and_the_others_go_on(
    crossing: Demo,
) -> None:
    """As one of another version may, in which the state has other words."""
    story = Story(crossing)
    story.start("a", until=8)
    story.wait("a", 2)
    with story.town.condition:
        story.start("b", until=8)
        story.loops["b"].state.digest = lambda weights: 1  # type: ignore[method-assign]
    with pytest.raises(TryAgain, match="are all of one version"):
        story.end()
    story.check()
    assert len(story.citizens["a"].commits) >= 7
    assert not story.citizens["b"].commits


def test_who_drifts_at_every_update_gives_up_too(crossing: Demo) -> None:
    """As on another kind of device: made equal it is, and after the next step it is not."""
    story = Story(crossing)
    story.start("a", until=12)
    story.wait("a", 2)
    with story.town.condition:
        story.start("b", until=12)
        state = story.loops["b"].state
        exact, seen = state.digest, set[int]()

        def drifting(weights: int) -> int:
            first = state.counters.update not in seen
            seen.add(state.counters.update)
            return exact(weights) + first

        state.digest = drifting  # type: ignore[method-assign]
    with pytest.raises(TryAgain, match="all on GPUs or none"):
        story.end()
    story.check()
    assert len(story.citizens["a"].commits) >= 11
    assert len(story.citizens["b"].commits) == 2


@pytest.mark.parametrize("coordinator_too", [True, False])
def test_who_is_lost_with_the_coordinator_may_live_and_is_fenced_off_by_a_new_life(
    crossing: Demo, coordinator_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "PATIENCE", 0.0)
    story = Story(crossing)

    def cut_off(what: str, count: int) -> bool:
        if what != "sum" or count != 2 or story.loops["c"].state.counters.update != 2:
            return False
        story.town.cut_off = coordinator_too
        return True

    with story.town.condition:
        story.start("a", until=6)
        story.start("b", until=6)
        story.start("c", until=6, doom=cut_off)
    story.end()
    one, other = (story.citizens[id].commits for id in "ab")
    assert one[:5] == other[:5]
    assert [update for _, update, _, _ in one] == list(range(1, len(one) + 1))
    life, resumed = (2, (None, 2)) if coordinator_too else (1, (0, 0))
    assert [its for its, *_ in one] == [1, 1, *[life] * (len(one) - 2)]
    for id in "ab":
        counters = story.loops[id].state.counters
        assert (counters.resumed_life, counters.resumed_update) == resumed


def test_a_group_that_was_overtaken_begins_anew_as_a_whole(crossing: Demo) -> None:
    """Else each would have the state from those that are left, and the last one never saves."""
    story = Story(crossing)
    with story.town.condition:
        for name in "abc":
            story.start(name, until=30)
    story.wait("a", 2)
    story.shelves["a"].overtaken = 1, "life 2"
    with pytest.raises(TryAgain, match="life 2"):
        story.end()
    assert len(story.failed) == 3
    assert len({story.citizens[id].commits[-1] for id in "abc"}) == 1


def test_fields_that_only_another_version_knows_keep_nobody_out(crossing: Demo) -> None:
    loop, _, _ = make(crossing)
    state = loop.state.state()
    state["spec"]["environment"]["processes"] = 64  # nor what is a host's own
    state["spec"]["ppo"]["later"] = 1
    del state["spec"]["ppo"]["clip"]
    loop.state.check_alike(state)


@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_is_rejected_by_all(
    crossing: Demo, which: str
) -> None:
    story = Story(crossing)
    todo = ["b"]

    def poison(what: str, count: int) -> bool:
        loop = story.loops.get("b")
        if loop is None or what != "gather" or loop.state.counters.update != 1 or not todo:
            return False
        todo.clear()
        losses = loop.ppo._losses

        def spoiled(*facts: Any, **named: Any) -> tuple[Tensor, Tensor]:
            loop.ppo._losses = losses  # type: ignore[method-assign]
            loss, parts = losses(*facts, **named)
            return (loss, parts * float("inf")) if which == "loss" else (loss * float("nan"), parts)

        loop.ppo._losses = spoiled  # type: ignore[method-assign]
        return False

    with story.town.condition:
        story.start("a", until=4)
        story.start("b", until=4, doom=poison)
    story.end()
    story.check()
    for loop in story.loops.values():
        assert loop.state.counters.rejected == 1
        assert loop.state.counters.update == 4
        assert torch.isfinite(weights(loop)).all()


@pytest.mark.parametrize("harm", [1.5, float("nan")])
def test_weights_that_differ_are_made_those_of_the_others(crossing: Demo, harm: float) -> None:
    story = Story(crossing)
    harmed: list[bool] = []

    def spoil(what: str, count: int) -> bool:
        loop = story.loops.get("b")
        if loop is not None and what == "commit" and count == 2 and not harmed:
            harmed.append(True)
            with torch.no_grad():
                next(loop.ppo.policy.parameters()).mul_(harm)
        return False

    with story.town.condition:
        story.start("a", until=5)
        story.start("b", until=5, doom=spoil)
        story.start("c", until=5)
    story.end()
    story.check()
    first, *others = story.loops.values()
    for loop in others:
        assert weights(loop).equal(weights(first))
    assert first.state.counters.rejected == 0
    assert first.state.counters.rolled_back >= 1
