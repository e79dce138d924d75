"""Where episodes begin: both rules against plain re-computations of what they promise."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demoreset_api.spec import CurriculumMode, CurriculumSpec
from demoreset_trainer.curriculum import Adaptive, Curriculum, Original, Result, make_curriculum

SKIP = 4


def result(start: int, success: bool, *, slot: int = 0, explored: bool = False) -> Result:
    """An episode from a frame."""
    return Result(slot, 0, start, success, 0, 40, 3, explored)


def adaptive(starts: int = 100, **spec: float) -> Adaptive:
    return Adaptive(
        CurriculumSpec.model_validate(spec), last_start=(starts - 1) * SKIP, frame_skip=SKIP
    )


def original(starts: int = 1001, slots: int = 80, **spec: float) -> Original:
    return Original(
        CurriculumSpec.model_validate({"mode": "Original", **spec}),
        last_start=(starts - 1) * SKIP,
        frame_skip=SKIP,
        slots=slots,
        rollout_length=32,
    )


# Adaptive

History = list[tuple[int, bool]]  # (start in decisions, success)
HISTORIES = st.lists(st.tuples(st.integers(0, 29), st.booleans()), max_size=150)


def evidence(history: History, starts: int, memory: float) -> list[tuple[float, float]]:
    """Of every start: wins and count, each result worth less by each later one at its start.

    A start's neighbours add theirs, the less the further they are (6 starts at most).
    """
    own = []
    for start in range(starts):
        seen = [success for place, success in history if place == start]
        worth = [memory ** (len(seen) - 1 - age) for age in range(len(seen))]
        own.append((sum(w for w, success in zip(worth, seen, strict=True) if success), sum(worth)))
    lent = []
    for start in range(starts):
        wins = count = 0.0
        for other in range(max(0, start - 6), min(starts, start + 7)):
            share = math.exp(-0.5 * ((start - other) / 1.5) ** 2)
            wins += share * own[other][0]
            count += share * own[other][1]
        lent.append((wins, count))
    return lent


@given(history=HISTORIES, memory=st.sampled_from([0.5, 0.93]))
@settings(deadline=None, max_examples=60)
def test_the_frontier_is_the_earliest_start_that_is_known_to_be_mastered(
    history: History, memory: float
) -> None:
    rule = adaptive(30, memory=memory, threshold=0.21)
    for first in range(0, len(history), 20):  # the updates
        rule.record([result(s * SKIP, success) for s, success in history[first : first + 20]])
    lent = evidence(history, 30, memory)
    expected = [wins / count if count else 0 for wins, count in lent]
    np.testing.assert_allclose(rule.success, expected, atol=1e-6)
    mastered = [
        start for start, (wins, count) in enumerate(lent) if count >= 2.5 and wins / count >= 0.21
    ]
    assert rule.frontier == (mastered[0] if mastered else 29) * SKIP


@given(
    history=HISTORIES,
    starts=st.integers(1, 30),
    window=st.integers(4, 200),
    skip=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_it_never_leaves_the_demo(
    history: History, starts: int, window: int, skip: int, seed: int
) -> None:
    spec = CurriculumSpec(window_frames=window)
    rule = Adaptive(spec, last_start=(starts - 1) * skip, frame_skip=skip)
    rule.record([result(s * skip, success) for s, success in history if s < starts])
    random = np.random.default_rng(seed)
    chosen = [rule.choose(0, random) for _ in range(30)]
    assert all(0 <= start <= (starts - 1) * skip for start in [rule.frontier, *chosen])
    assert all(start % skip == 0 for start in chosen)
    assert 0 <= rule.success_rate() <= 1
    guidance = rule.guidance()
    assert 0 <= guidance.first < guidance.after <= starts
    assert guidance.after <= guidance.first + len(guidance.weights) <= starts
    assert ((guidance.weights >= 0) & (guidance.weights <= 1)).all()
    assert guidance.first <= rule.frontier // skip < guidance.after


def learn(rule: Curriculum, able: int, updates: int, random: np.random.Generator) -> None:
    """A player who succeeds from `able` on and nowhere before."""
    for _ in range(updates):
        starts = [rule.choose(slot, random) for slot in range(16)]
        rule.record([result(s, s >= able, slot=slot) for slot, s in enumerate(starts)])


def test_it_moves_back_to_what_can_be_done_and_forward_when_that_is_lost() -> None:
    rule, random = adaptive(), np.random.default_rng(0)
    assert rule.frontier == 99 * SKIP
    learn(rule, 60 * SKIP, 100, random)
    assert 56 * SKIP <= rule.frontier <= 62 * SKIP
    learn(rule, 30 * SKIP, 100, random)
    assert 26 * SKIP <= rule.frontier <= 32 * SKIP
    learn(rule, 80 * SKIP, 300, random)
    assert 75 * SKIP <= rule.frontier <= 82 * SKIP
    learn(rule, 0, 200, random)
    assert rule.frontier == 0


def test_one_lucky_start_does_not_move_it() -> None:
    rule = adaptive()
    rule.record([result(10 * SKIP, True), result(10 * SKIP, True)])
    assert rule.frontier == 99 * SKIP
    rule.record([result(10 * SKIP, True)] * 2)
    assert rule.frontier < 12 * SKIP


def test_explored_episodes_are_no_evidence() -> None:
    rule = adaptive()
    rule.record([result(40 * SKIP, True, explored=True)] * 50)
    assert rule.frontier == 99 * SKIP
    assert rule.state() == adaptive().state()


def test_most_episodes_begin_in_the_window_and_the_rest_where_success_is_unsure() -> None:
    rule = adaptive(window_share=0.65, window_frames=48)
    # Mastered from 50 on, but 80 is won in half of the episodes only.
    history: History = []
    for time in range(60):
        history += [(s, True) for s in range(50, 100) if not 78 <= s <= 82]
        history += [(s, time % 2 > 0) for s in range(78, 83)]
        history += [(s, False) for s in range(38, 50)]
    rule.record([result(s * SKIP, success) for s, success in history])
    frontier = rule.frontier // SKIP
    random = np.random.default_rng(0)
    draws = 8000
    counts = Counter(rule.choose(0, random) // SKIP for _ in range(draws))
    window = range(frontier - 4, frontier + 8)  # 12 decisions, two thirds of them after it
    assert sum(counts[s] for s in window) / draws == pytest.approx(0.65, abs=0.02)
    for start in window:
        assert counts[start] / draws == pytest.approx(0.65 / 12, abs=0.015)
    assert min(counts) == window[0]
    unsure = {s: math.sqrt(p * (1 - p)) + 0.02 for s, p in enumerate(rule.success.tolist())}
    after = range(window[-1] + 1, 100)
    total = sum(unsure[s] for s in after)
    for start in after:
        assert counts[start] / draws == pytest.approx(0.35 * unsure[start] / total, abs=0.012)
    assert unsure[80] > 5 * unsure[95]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_once_it_is_the_games_own_start_a_share_of_all_begins_there(share: float) -> None:
    rule, random = adaptive(start_share=share), np.random.default_rng(0)
    rule.record([result(s * SKIP, True) for s in range(100)] * 4)
    assert rule.frontier == 0
    starts = [rule.choose(0, random) for _ in range(3000)]
    in_window = 0.65 / 8  # decisions 0 to 7
    expected = share + (1 - share) * in_window
    assert starts.count(0) / 3000 == pytest.approx(expected, abs=0.03)


def test_with_a_horizon_only_its_own_success_makes_the_games_own_start_the_frontier() -> None:
    rule = adaptive(20, horizonFrames=40, startShare=0.5)
    results = [result(start, True) for start in range(4, 60, 4) for _ in range(20)]
    rule.record(results + [result(0, False) for _ in range(20)])
    assert rule.frontier == 4
    assert rule.success[0] == 0
    random = np.random.default_rng(0)
    chosen = [rule.choose(0, random) for _ in range(1000)]
    assert chosen.count(0) > 450, "it is practised, though"
    rule.record([result(0, True) for _ in range(200)])
    assert rule.frontier == 0


def test_with_a_horizon_what_fails_of_the_whole_demo_says_nothing_of_the_starts_beside_it() -> None:
    rule = adaptive(20, horizonFrames=40)
    near = [result(start, n % 4 == 0) for start in range(4, 60, 4) for n in range(40)]
    rule.record(near + [result(0, False) for _ in range(40)])
    assert rule.frontier == 4


@pytest.mark.parametrize("memory", [0.3, 0.5, 0.6])
def test_a_short_memory_is_enough_for_the_games_own_start(memory: float) -> None:
    rule = adaptive(20, horizonFrames=40, memory=memory)
    rule.record([result(start, True) for start in range(0, 60, 4) for _ in range(50)])
    assert rule.frontier == 0


def test_a_demo_of_one_decision_has_one_start() -> None:
    rule, random = adaptive(1), np.random.default_rng(0)
    assert {rule.choose(0, random) for _ in range(50)} == {0}


def test_the_success_rate_is_that_of_the_window() -> None:
    rule = adaptive(memory=0.999)
    assert rule.success_rate() == 0
    rule.record([result(s * SKIP, s in (97, 20)) for s in (20, 95, 96, 97, 98)])
    # The neighbours of 97 have evidence enough from 96 on; the window is decisions 92 to 99.
    assert rule.frontier == 96 * SKIP
    assert rule.success_rate() == pytest.approx(1 / 4, abs=0.01)


def test_the_guidance_is_around_the_frontier_and_after_it_and_fades_with_success() -> None:
    rule = adaptive()
    rule.record([result(s * SKIP, True) for s in range(50, 100)] * 4)
    frontier = rule.frontier // SKIP
    guidance = rule.guidance()
    assert (guidance.first, guidance.after) == (frontier - 8, frontier + 24)
    np.testing.assert_allclose(guidance.weights, 1 - rule.success[frontier - 8 :])
    assert guidance.weights[-1] < 1e-9
    assert guidance.weights[0] > 0.99


# Original: the arithmetic of openai/atari-reset


def period(rule: Original, results: list[Result], updates: int = 32) -> None:
    """1024 vector steps of 32 each; the results come somewhere in between."""
    for update in range(updates):
        rule.record(results if update == updates // 2 else [])


def at_points(rule: Original, success: bool) -> list[Result]:
    maximum = rule.frontier
    return [result(max(0, maximum - point * SKIP), success) for point in range(80)]


def test_slots_own_points_below_the_maximum() -> None:
    rule, random = original(window_share=1.0), np.random.default_rng(0)
    assert [rule.choose(s, random) for s in range(80)] == [(1000 - s) * SKIP for s in range(80)]
    crowded = original(slots=200, window_share=1.0)
    # 320 frames are 80 decisions: ceil(200 / 80) = 3 slots share a point.
    assert [crowded.choose(s, random) for s in (0, 2, 3, 199)] == [4000, 4000, 3996, 4000 - 66 * 4]
    alone = original(slots=1, window_share=1.0)
    assert alone.choose(0, random) == 4000


def test_the_rest_begins_anywhere_after_the_point() -> None:
    rule, random = original(window_share=0.8), np.random.default_rng(0)
    counts = Counter(rule.choose(9, random) // SKIP for _ in range(10_000))
    assert set(counts) == set(range(991, 1001))
    assert counts[991] / 10_000 == pytest.approx(0.8 + 0.2 / 10, abs=0.02)
    for start in range(992, 1001):
        assert counts[start] / 10_000 == pytest.approx(0.2 / 10, abs=0.006)


def test_it_moves_after_1024_vector_steps_and_not_before() -> None:
    rule = original()
    period(rule, at_points(rule, True), 31)
    assert rule.frontier == 4000
    rule.record([])
    # The sum of success from the demo's beginning reaches 0.2 * 80 at the 16th point from below.
    assert rule.frontier == (1000 - 79 + 15) * SKIP == 4000 - 256
    assert rule.success_rate() == 1


def test_its_success_is_told_before_it_moves_for_the_first_time() -> None:
    rule = original()
    assert rule.success_rate() == 0
    period(rule, at_points(rule, True), 3)
    assert (rule.frontier, rule.success_rate()) == (4000, 1)


@pytest.mark.parametrize(("success", "reached"), [(1.0, True), (0.5, True), (0.1, False)])
def test_it_reaches_the_games_own_start_where_success_is_enough(
    success: float, reached: bool
) -> None:
    rule = original(starts=200)
    random = np.random.default_rng(0)
    for _ in range(20):
        starts = [rule.choose(slot, random) for slot in range(80)] * 10
        period(rule, [result(start, number % 10 < 10 * success) for number, start in
                      enumerate(sorted(starts))])  # fmt: skip
    assert (rule.frontier == 0) is reached


def test_success_is_overwritten_where_it_was_seen_and_kept_elsewhere() -> None:
    rule = original()
    period(rule, at_points(rule, True))
    period(rule, at_points(rule, False))  # 857..936 fail; 937..1000 keep their success
    assert rule.frontier == (937 + 15) * SKIP
    assert rule.success_rate() == 0
    half = [result(s * SKIP, won) for s in range(873, 953) for won in (True, False)]
    period(rule, half)
    assert rule.frontier == (873 + 31) * SKIP
    assert rule.success_rate() == 0.5


def test_without_success_it_retreats_but_not_beyond_the_demo() -> None:
    rule = original()
    rule.load({**rule.state(), "maximum": 960, "updates": 1000 * 32})
    period(rule, [])
    assert rule.frontier == (960 + 25) * SKIP
    period(rule, [])
    assert rule.frontier == 1000 * SKIP


def test_it_waits_until_it_has_played_half_as_many_steps_as_it_went_back() -> None:
    rule = original()
    rule.load({**rule.state(), "maximum": 0})
    period(rule, [])  # 1024 steps; it went back by 4000 frames
    assert rule.frontier == 0
    period(rule, [])
    assert rule.frontier == 100


def test_the_width_counts_the_points() -> None:
    # atari-reset's width was one too small, and with one slot divided by zero.
    rule = original(slots=1)
    period(rule, [result(4000, True)])
    assert rule.frontier == 4000
    rule = original(slots=5, threshold=0.81)
    period(rule, [result((1000 - s) * SKIP, True) for s in range(5)])
    assert rule.frontier == 4000  # 5 of 5 points are needed
    rule = original(slots=5, threshold=0.79)
    period(rule, [result((1000 - s) * SKIP, True) for s in range(5)])
    assert rule.frontier == 3996


def test_points_at_the_start_move_away_from_it_again() -> None:
    rule, random = original(window_share=1.0), np.random.default_rng(0)
    rule.load({**rule.state(), "maximum": 20, "updates": 32 * 1000})
    assert [rule.choose(slot, random) for slot in (0, 19, 20, 79)] == [80, 4, 0, 0]
    for _ in range(4):
        period(rule, at_points(rule, False))
    assert rule.frontier == 480
    assert [rule.choose(slot, random) for slot in (0, 19, 20, 79)] == [480, 404, 400, 164]


def test_the_originals_guidance_is_its_window() -> None:
    rule = original()
    period(rule, at_points(rule, True))
    guidance = rule.guidance()
    assert (guidance.first, guidance.after) == (936 - 79, 937)
    np.testing.assert_array_equal(guidance.weights, [1.0] * 64 + [0.0] * 16)


# Both


@pytest.mark.parametrize("mode", list(CurriculumMode))
def test_it_goes_on_from_its_state(mode: CurriculumMode) -> None:
    def make() -> Curriculum:
        return make_curriculum(
            CurriculumSpec(mode=mode), last_start=800, frame_skip=4, slots=16, rollout_length=32
        )

    assert isinstance(make(), Adaptive if mode is CurriculumMode.ADAPTIVE else Original)
    rule, other = make(), make()
    random = np.random.default_rng(0)
    learn(rule, 600, 70, random)
    assert rule.frontier < 800
    other.load(json.loads(json.dumps(rule.state())))
    assert other.frontier == rule.frontier
    for one in (rule, other):
        learn(one, 400, 40, np.random.default_rng(1))
    assert other.state() == rule.state()
    assert other.success_rate() == rule.success_rate()
    np.testing.assert_array_equal(other.guidance().weights, rule.guidance().weights)


def test_a_window_below_one_decision_is_one_decision_wide() -> None:
    original = make_curriculum(
        CurriculumSpec(mode=CurriculumMode.ORIGINAL, window_frames=4),
        last_start=800,
        frame_skip=8,
        slots=4,
        rollout_length=32,
    )
    assert original.choose(3, np.random.default_rng(0)) in range(0, 801, 8)
