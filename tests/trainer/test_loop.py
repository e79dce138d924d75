"""The loop: the same seed gives the same run, a failed update leaves no trace, nothing is lost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demoreset_api.errors import NoProgress, TryAgain
from demoreset_api.spec import Goal
from demoreset_trainer import run_folder
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.demo import Demo, record
from demoreset_trainer.episode import last_start
from demoreset_trainer.goal import Evaluation
from demoreset_trainer.group import Alone, MemberLost, Quorum, update_of
from demoreset_trainer.loop import Loop
from demoreset_trainer.rollout import Start
from demoreset_trainer.states import start_states
from small_run import make, weights


@pytest.fixture(scope="module")
def crossing() -> Demo:
    return record("freeway", np.full(172, 2, np.uint8), frame_skip=4)


def after(loop: Loop, updates: int) -> Callable[[], bool]:
    goal = loop.state.counters.update + updates
    return lambda: loop.state.counters.update >= goal


RECURRENT: dict[str, Any] = {"policy": {"recurrent": True}, "ppo": {"burnIn": 4}}


@pytest.mark.parametrize("changes", [{}, RECURRENT], ids=["feed-forward", "recurrent"])
def test_the_same_seed_gives_the_same_run_bit_by_bit(
    crossing: Demo, changes: dict[str, Any]
) -> None:
    ends = []
    for _ in range(2):
        loop, diary, _ = make(crossing, **changes)
        loop.run(after(loop, 3))
        ends.append((weights(loop), loop.state.curriculum.state(), diary.progress[-1].entropy))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_another_seed_gives_another_run(crossing: Demo) -> None:
    first, _, _ = make(crossing)
    second, _, _ = make(crossing)
    second.spec = first.spec.model_copy(update={"seed": 1})
    for loop in (first, second):
        loop.run(after(loop, 1))
    assert not torch.equal(weights(first), weights(second))


def test_a_run_goes_on_from_a_snapshot_with_all_that_it_had(crossing: Demo) -> None:
    loop, _, shelf = make(crossing)
    loop.run(after(loop, 3))
    snapshot = shelf.saved[-1]
    again, diary, _ = make(crossing)
    again._membership.load(snapshot)
    assert torch.equal(weights(loop), weights(again))
    assert again.state.counters == replace(
        loop.state.counters, resumed_life=1, resumed_update=3, resumed_frames=3 * 8 * 8 * 4
    )
    assert again.state.curriculum.state() == loop.state.curriculum.state()
    assert again.state.goal.state() == loop.state.goal.state()
    again.run(after(again, 1))
    assert diary.progress[0].update == 4
    assert diary.progress[0].frames == 4 * 8 * 8 * 4
    assert (diary.progress[0].resumed_life, diary.progress[0].resumed_update) == (1, 3)
    assert (loop.state.counters.resumed_life, loop.state.counters.resumed_update) == (0, 0)
    assert diary.progress[0].seconds > loop.state.counters.seconds
    # Adam went on with its moments: a fresh one would begin to count its steps anew.
    steps = [value for name, value in again.ppo.state()[1].items() if name.endswith(".step")]
    assert {int(step) for step in steps} == {4 * 2 * 2}


def asked_for(loop: Loop) -> set[tuple[int, int]]:
    """The slots and episodes for which it will have drawn random numbers."""
    asked, choose = set(), loop._choose

    def overheard(slot: int, episode: int, random: np.random.Generator) -> Start:
        asked.add((slot, episode))
        return choose(slot, episode, random)

    loop._choose = overheard  # type: ignore[method-assign]
    return asked


def test_no_episode_has_the_random_numbers_of_one_of_an_earlier_life(crossing: Demo) -> None:
    lives: list[set[tuple[int, int]]] = []
    snapshot: Snapshot | None = None
    for _ in range(3):
        loop, _, _ = make(crossing)
        if snapshot is not None:
            loop._membership.load(snapshot)
        lives.append(asked_for(loop))
        loop.run(after(loop, 2))
        snapshot = loop.snapshot()
    assert all(len(life) >= 2 * 8 for life in lives)  # that which runs, and the one planned
    assert len(set.union(*lives)) == sum(map(len, lives))


def test_a_snapshot_does_not_change_while_training_goes_on(crossing: Demo) -> None:
    loop, _, shelf = make(crossing)
    loop.run(after(loop, 1))
    before = {name: tensor.clone() for name, tensor in shelf.saved[0].model.items()}
    loop.run(after(loop, 1))
    for name, tensor in shelf.saved[0].model.items():
        assert torch.equal(tensor, before[name])


def test_a_met_goal_stays_met_and_another_goal_is_a_new_one(crossing: Demo) -> None:
    loop, _, _ = make(crossing)
    loop.run(after(loop, 1))
    loop.state.goal.met = True
    snapshot = loop.snapshot()
    for goal, met in (({}, True), ({"successRate": 0.99}, False)):
        again, _, _ = make(crossing, goal=goal)
        again._membership.load(snapshot)
        assert again.state.goal.met is met


class Faulty(Alone):
    """A group in which some sums go wrong: `faults` are the numbers of gradients."""

    def __init__(self, faults: Sequence[int], *, lost: bool) -> None:
        self.faults, self.lost, self.gradients = faults, lost, 0

    def sum(self, tensor: Tensor) -> None:
        if tensor.numel() < 1000:
            return
        if self.gradients in self.faults:
            if self.lost:
                self.gradients += 1
                raise MemberLost("gone")
            tensor[7] = float("nan")
        self.gradients += 1


def test_an_update_whose_gradient_is_not_finite_leaves_no_trace(crossing: Demo) -> None:
    loop, diary, _ = make(crossing, group=Faulty([1], lost=False))
    before = weights(loop).clone()
    loop.run(after(loop, 1))
    assert diary.progress[-1].rejected_updates == 1
    assert "rejected" in diary.notes[0]
    assert torch.isfinite(weights(loop)).all()
    assert not torch.equal(weights(loop), before)


def test_a_step_that_leaves_a_weight_that_is_not_finite_leaves_no_trace(
    crossing: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, diary, _ = make(crossing)
    update, step, tries, steps = loop.ppo.update, loop.ppo.optimizer.step, [], []

    def counted(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        return update(*arguments, **options)

    def poisoned() -> None:
        step()
        steps.append(1)
        if len(steps) == 2 * 2 * 2:  # the last of the second update
            next(loop._policy.parameters()).data.view(-1)[3] = float("inf")

    monkeypatch.setattr(loop.ppo, "update", counted)
    monkeypatch.setattr(loop.ppo.optimizer, "step", poisoned)
    loop.run(after(loop, 2))
    assert torch.isfinite(weights(loop)).all()
    assert (loop.state.counters.update, loop.state.counters.rejected, len(tries)) == (2, 1, 3)
    assert "a weight is not finite" in diary.notes[0]


def test_an_update_that_fails_three_times_ends_the_run_with_its_weights_as_before(
    crossing: Demo,
) -> None:
    loop, _, _ = make(crossing, group=Faulty(range(100), lost=False))
    before = weights(loop).clone()
    with pytest.raises(NoProgress, match=r"norm is nan; lower spec.ppo.learningRate") as error:
        loop.run(after(loop, 1))
    assert error.value.exit_code == 66
    assert torch.equal(weights(loop), before)
    assert loop.state.counters.update == 0


def test_a_lost_member_in_the_middle_of_an_update_costs_nothing(crossing: Demo) -> None:
    undisturbed, _, _ = make(crossing, group=Faulty([], lost=True))
    disturbed, _, _ = make(crossing, group=Faulty([2], lost=True))
    for loop in (undisturbed, disturbed):
        loop.run(after(loop, 2))
    assert torch.equal(weights(undisturbed), weights(disturbed))


def test_an_update_that_is_interrupted_leaves_the_weights_of_the_one_before(
    crossing: Demo,
) -> None:
    class Interrupted(Faulty):
        def sum(self, tensor: Tensor) -> None:
            super().sum(tensor)
            if self.gradients == 3:
                raise KeyboardInterrupt

    loop, _, _ = make(crossing, group=Interrupted([], lost=False))
    before = weights(loop).clone()
    with pytest.raises(KeyboardInterrupt):
        loop.run(lambda: False)
    assert torch.equal(weights(loop), before)
    assert loop.snapshot().update == 0
    assert not loop.ppo.state()[1]


def test_members_that_play_other_slots_do_not_have_the_same_digest(crossing: Demo) -> None:
    loop, _, _ = make(crossing)
    digests = set()
    for owners in ("aabb", "abab"):
        loop.state.owners = list(owners)
        digests.add(loop.state.digest(1))
    assert len(digests) == 2


class Outcast(Alone):
    """A group that this member sits out of, after some updates, until it is to begin anew."""

    def quorum(self, step: int) -> Quorum:
        if update_of(step) == 2:
            raise TryAgain("sat out")
        return super().quorum(step)


def test_what_one_that_sat_out_knows_is_not_the_best_of_the_run(crossing: Demo) -> None:
    loop, _, _ = make(crossing, group=Outcast())
    with pytest.raises(TryAgain):
        loop.run(lambda: False)
    assert loop.saves
    assert not loop.candidate


def test_a_state_that_is_known_to_be_wrong_is_none(crossing: Demo) -> None:
    loop, _, _ = make(crossing)
    loop.run(after(loop, 2))
    assert loop.state.step > 0
    loop.state.life = 0
    assert loop.state.step == 0


def test_the_budget_ends_the_run(crossing: Demo) -> None:
    loop, diary, _ = make(crossing, budget={"frames": 600})
    stopped = loop.run(lambda: False)
    assert stopped.budget_spent
    assert not stopped.goal_met
    assert diary.progress[-1].frames == 3 * 8 * 8 * 4  # the first update at or over it


def test_playing_on_begins_at_the_start_without_the_demos_limits(crossing: Demo) -> None:
    loop, diary, _ = make(crossing)
    loop.state.playing_on = True
    assert loop._choose(0, 0, np.random.default_rng()).frame == 0
    assert not loop._choose(0, 0, np.random.default_rng()).limits
    loop.run(after(loop, 2))
    assert diary.progress[-1].guide_loss == 0


def test_what_met_the_goal_stays_the_best_while_it_plays_on(crossing: Demo) -> None:
    loop, diary, shelf = make(crossing, goal={"after": "PlayOn"})
    loop.state.goal.met = True
    stopped = loop.run(after(loop, 2))
    assert loop.state.playing_on
    assert shelf.candidates == [True, False, False]
    assert not stopped.goal_met  # it was asked to stop, and is to go on
    assert len(diary.notes) == 1
    again, diary, shelf = make(crossing, goal={"after": "PlayOn"}, budget={"frames": 900})
    again._membership.load(loop.snapshot())
    stopped = again.run(lambda: False)
    assert stopped.goal_met
    assert stopped.budget_spent
    assert shelf.candidates == [False, False]
    assert not diary.notes


def test_a_policy_that_was_just_confirmed_is_saved_though_nothing_is_due(crossing: Demo) -> None:
    loop, _, shelf = make(crossing, goal={"episodes": 2})
    shelf.due = lambda: False  # type: ignore[method-assign]
    commit = loop._commit

    def confirm(shares: Any, met: bool) -> None:
        if loop.state.counters.update == 1:
            shares = [shares[0] | {"successes": [True, False]}]
        commit(shares, met)

    loop._commit = confirm  # type: ignore[method-assign]
    loop.run(after(loop, 4))
    assert [saved.update for saved in shelf.saved] == [2]
    assert loop.state.goal.evaluation == Evaluation(update=1, episodes=2, successes=1)


def test_a_run_that_is_to_play_on_is_not_over_whatever_was_saved_last(crossing: Demo) -> None:
    loop, _, shelf = make(crossing, goal={"after": "PlayOn"})
    commit = loop._commit

    def meet(shares: Any, met: bool) -> None:  # in an update after which a checkpoint is due
        commit(shares, met)
        loop.state.goal.met = True

    loop._commit = meet  # type: ignore[method-assign]
    loop.run(after(loop, 1))
    saved = shelf.saved[0].state
    assert saved["goal"]["met"]
    assert not run_folder.goal_met(saved, loop.spec)
    stop = loop.spec.model_copy(update={"goal": Goal()})
    assert run_folder.goal_met(saved | {"spec": stop.model_dump(mode="json", by_alias=True)}, stop)


def test_a_run_that_played_on_and_has_another_goal_is_taught_again(crossing: Demo) -> None:
    loop, _, _ = make(crossing, goal={"after": "PlayOn"})
    loop.state.goal.met = loop.state.playing_on = True
    loop.run(after(loop, 1))
    again, _, _ = make(crossing, goal={"successRate": 0.99})
    again._membership.load(loop.snapshot())
    assert not again.state.playing_on
    assert not again.state.goal.met


def test_the_original_rule_knows_how_well_it_plays_from_the_games_own_start(
    crossing: Demo,
) -> None:
    loop, _, _ = make(crossing, curriculum={"mode": "Original"})
    loop.state.curriculum.load(loop.state.curriculum.state() | {"maximum": 0})
    loop.run(lambda: loop.state.goal.rate is not None or loop.state.counters.update > 40)
    assert loop.state.goal.rate is not None


def test_the_last_start_has_something_left_to_earn(crossing: Demo) -> None:
    start = last_start(crossing, 4)
    final = crossing.scores[-1]
    assert crossing.scores[start] < final
    assert start + 4 >= len(crossing) or crossing.scores[start + 4] == final


def test_progress_tells_what_happened(crossing: Demo) -> None:
    loop, diary, _ = make(crossing)
    loop.run(after(loop, 3))
    last = diary.progress[-1]
    assert last.demo_frames == 172
    assert last.outcomes.keys() <= {"GAME_OVER", "LIFE_LOST", "SUCCESS", "BEHIND"}
    assert sum(last.outcomes.values()) == last.ended
    assert set(last.phase_seconds) == {
        "quorum",
        "copy",
        "rollout",
        "optimise",
        "record",
        "checkpoint",
    }
    assert last.frames_per_second > 0
    assert 0 < last.entropy <= np.log(3) + 1e-6


@pytest.mark.parametrize(
    ("reached", "wins", "rung", "playing_on", "learning_rate", "entropy"),
    [
        (False, None, 0, False, 4e-4, 2e-3),
        (False, 9, 0, False, 4e-4, 2e-3),  # the start has moved away again: nothing to keep
        (True, None, 0, False, 4e-4, 2e-3),
        (True, 0, 0, False, 4e-4, 2e-3),
        (True, 4, 0, False, 2.8e-4, 2e-3),  # 0.75 x 4 of 10 are taken off
        (True, 10, 0, False, 1e-4, 2e-3),
        (False, None, 1, False, 2e-4, 2e-4),
        (False, None, 3, False, 5e-5, 2e-6),
        (True, 4, 2, False, 7e-5, 2e-5),
        (True, 10, 1, True, 2e-4, 2e-4),  # for score: the goal is behind it
    ],
)
def test_the_step_size_and_the_entropy_in_force(
    crossing: Demo,
    reached: bool,
    wins: int | None,
    rung: int,
    playing_on: bool,
    learning_rate: float,
    entropy: float,
) -> None:
    loop, diary, _ = make(
        crossing,
        environment={"slots": 2},
        ppo={"minibatches": 1, "learningRate": 4e-4, "entropy": 2e-3},
        stall={"learningRateFactor": 0.5, "entropyFactor": 0.1},
    )
    state, update, told = loop.state, loop.ppo.update, dict[str, Any]()
    if reached:
        known = [9.0] * len(state.curriculum.state()["wins"])
        state.curriculum.load({"wins": known, "counts": known})
    latest = [] if wins is None else [True] * wins + [False] * (10 - wins)
    state.goal.load({"latest": latest, "since": 0, "met": False})
    # With nothing better to come, what follows is no progress: the rung stays.
    best = {"best_start": 0, "best_goal_rate": 1.0}
    state.ladder.load(state.ladder.state() | best | {"rung": rung})
    state.playing_on = playing_on

    def overheard(*arguments: Any, **options: Any) -> Any:
        told.update(options)
        return update(*arguments, **options)

    loop.ppo.update = overheard  # type: ignore[method-assign]
    loop.run(after(loop, 1))
    assert told["learning_rate"] == pytest.approx(learning_rate)
    assert told["entropy"] == pytest.approx(entropy)
    assert diary.progress[-1].entropy_coefficient == pytest.approx(entropy)
    assert diary.progress[-1].learning_rate == told["learning_rate"]


@pytest.mark.parametrize(
    ("guide", "reached", "wins", "playing_on", "entropy"),
    [
        (0.1, True, 10, False, 2e-3),
        (0, True, 0, False, 2e-2),
        (0, True, 4, False, 1.4e-2),  # 0.75 x 4 of 10 are taken off
        (0, True, 10, False, 5e-3),
        (0, False, 10, False, 2e-2),  # the start has moved away again
        (0.1, True, 4, True, 2e-3),
        (0, True, 4, True, 5e-3),  # for score: what was found is kept
    ],
)
def test_the_entropy_bonus_is_large_without_a_guide_and_smaller_near_the_goal(
    crossing: Demo, guide: float, reached: bool, wins: int, playing_on: bool, entropy: float
) -> None:
    loop, _, _ = make(crossing, curriculum={"guide": guide})
    latest = [True] * wins + [False] * (10 - wins)
    loop.state.goal.load({"latest": latest, "since": 0, "met": False})
    if reached:
        known = [9.0] * len(loop.state.curriculum.state()["wins"])
        loop.state.curriculum.load({"wins": known, "counts": known})
    loop.state.playing_on = playing_on
    assert loop._entropy_coefficient() == pytest.approx(entropy)


@pytest.mark.parametrize(
    ("slots", "followed"),
    [(8, [True] * 4), (2, [False, True, False, True])],  # 43 decisions, of which 16 are played
)
def test_the_memory_at_the_starts_follows_the_weights_unless_the_demo_is_long(
    crossing: Demo, slots: int, followed: list[bool]
) -> None:
    loop, _, _ = make(crossing, environment={"slots": slots}, **RECURRENT)
    commit, seen = loop._commit, list[bool]()
    afresh = BurnIn(loop.ppo.policy, start_states(crossing, loop.ppo.policy.shape.view, 4), 4)

    def watched(shares: Any, met: bool) -> None:
        commit(shares, met)
        afresh.refresh()
        seen.append(torch.allclose(loop._burn_in.hidden, afresh.hidden, rtol=0, atol=1e-6))

    loop._commit = watched  # type: ignore[method-assign]
    loop.run(after(loop, 4))
    assert seen == followed
