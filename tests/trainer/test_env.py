"""One slot, with real games: how episodes end, what they pay, which randomness they draw."""

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from demoreset_api.errors import UserError
from demoreset_trainer.demo import Demo, record
from demoreset_trainer.emulator import Emulator
from demoreset_trainer.env import DemoResetEnv, End, Judge, Rules
from demoreset_trainer.states import Camera, View, start_states

NOTHING, FIRE, UP = 0, 1, 2  # joystick codes


def play_on(env: DemoResetEnv, code: int, most: int = 200) -> float:
    """Play the same joystick code to the episode's end; what it paid."""
    paid = 0.0
    for _ in range(most):
        paid += env.play(env.action_codes.index(code))
        if env.end:
            return paid
    raise AssertionError(f"no end in {most} decisions")


def test_gymnasium_finds_nothing_to_complain_about(freeway: Demo) -> None:
    check_env(DemoResetEnv(freeway, max_frames=40, render_mode="rgb_array"), skip_render_check=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frame_skip": 0}, "frame_skip: received 0; it is a whole number from 1 on"),
        ({"no_ops": -1}, "no_ops: received -1"),
        ({"max_frames": 0}, "max_frames: received 0"),
        ({"life_loss_ends": "x"}, "life_loss_ends: received 'x'; it is True or False"),
        ({"sticky_probability": 2}, "sticky_probability: received 2; it is from 0 to 1"),
    ],
)
def test_rules_that_cannot_be_are_refused(
    freeway: Demo, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        DemoResetEnv(freeway, **settings)


def test_actions_and_options_that_there_are_not_are_named(freeway: Demo) -> None:
    env = DemoResetEnv(freeway)
    with pytest.raises(UserError, match="options: received strat; known are start and limits"):
        env.reset(options={"strat": 4})
    with pytest.raises(UserError, match=r"start: received 1\.5"):
        env.reset(options={"start": 1.5})
    with pytest.raises(UserError, match="limits: received 'no'; it is True or False"):
        env.reset(options={"limits": "no"})
    env.reset()
    for action in (-1, 3, 1.5, "x"):
        with pytest.raises(UserError, match=f"action: received {action}; this game's are 0 to 2"):
            env.step(action)  # type: ignore[arg-type]
    assert env.step(np.int64(2))[4]["frame"] == env.step(np.array(2))[4]["frame"] - 4


def test_single_fields_of_given_rules_can_be_others(freeway: Demo) -> None:
    rules = Rules(max_frames=40)
    assert DemoResetEnv(freeway, rules=rules, no_ops=30).rules == replace(rules, no_ops=30)


def test_gymnasium_makes_it_by_name() -> None:
    env = gymnasium.make("DemoReset-v0", demo="freeway-crossing", render_mode="rgb_array")
    observation, info = env.reset(options={"start": 160})
    assert observation in env.observation_space
    assert (info["start"], info["frame"], info["end"]) == (160, 160, "NONE")
    screen = env.render()
    assert isinstance(screen, np.ndarray)
    assert screen.shape == (210, 160, 3)


def test_what_is_shown_after_a_reset_is_what_is_there(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, render_mode="rgb_array")
    screens = []
    for start in (0, 160, 0):
        env.reset(options={"start": start})
        screens.append(np.asarray(env.render()))
    assert np.array_equal(screens[0], screens[2])
    assert not np.array_equal(screens[0], screens[1])
    played = DemoResetEnv(freeway)
    for one in (env, played):  # to have looked changes nothing
        one.reset(seed=1, options={"start": 160})
    assert np.array_equal(env.step(1)[0], played.step(1)[0])
    assert np.array_equal(np.asarray(env.render()), env.emulator.rgb())


@pytest.mark.parametrize("game", ["demon_attack", "amidar"])
def test_the_first_lost_life_counts_from_the_games_own_start(game: str) -> None:
    """At power-on the emulator tells too few lives, which the first frame mends."""
    env = DemoResetEnv(record(game, np.zeros(40, np.uint8), frame_skip=4), lag_frames=10**5)
    ends = []
    for start in (0, 4):
        env.reset(options={"start": start})
        env._goal_score = 10**6  # out of reach: a lost life ends an episode, or the loss of all
        while not env.step(0)[2]:
            pass
        ends.append(env.end)
    assert ends == [End.LIFE_LOST] * 2


def test_an_episode_has_the_demos_lives_at_its_start_and_not_those_of_what_was_played_before() -> (
    None
):
    """After a restore this emulator tells those of its earlier play, until a frame is played."""
    actions = np.random.default_rng(0).integers(0, 18, 100).astype(np.uint8).repeat(8)
    demo = record("atlantis2", actions, frame_skip=4)
    (lost, *_) = np.flatnonzero(np.diff(demo.lives.astype(int)) < 0)
    after = int(lost) // 4 * 4 + 8
    env = DemoResetEnv(demo)
    begun = []
    for start in (0, after, 0, after):
        env.reset(options={"start": start})
        env.step(0)
        begun.append((env._lives, env.end))
    assert begun[:2] == begun[2:]
    assert begun[1] == (demo.lives[after - 1], End.NONE)
    assert begun[0][0] > begun[1][0]


def test_a_life_that_is_gained_gives_none_back(assault: Demo) -> None:
    env = DemoResetEnv(assault)
    env.reset(options={"start": 0})
    had = env._lives
    env.emulator.lives = iter([had, had + 1, had + 1, had]).__next__
    env.play(0)
    assert (env.end, env.frame) == (End.LIFE_LOST, 4)


def test_the_demos_final_score_is_enough_where_it_has_lost_points_again(freeway: Demo) -> None:
    rewards = np.zeros(len(freeway), np.int32)
    rewards[[60, 110, 150]] = 3, 3, -1
    states = start_states(freeway, View(), 4)
    env = DemoResetEnv(replace(freeway, rewards=rewards), states=states, horizon_frames=40)
    goals = []
    for start in (0, 40, 80, 160):
        env.begin(start)
        goals.append(env._goal_score)
    assert goals == [5, 5, 5, 5]


def test_a_score_that_is_lost_again_is_remembered(freeway: Demo) -> None:
    env = DemoResetEnv(freeway)
    env.reset(options={"start": 168})
    env.step(env.action_codes.index(UP))
    assert (env.score, env.highest) == (1, 1)
    env.score = -5
    env.step(0)
    assert env.highest == 1


def test_a_success_comes_exactly_when_the_score_ties(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, extra_frames=1)
    env.reset(options={"start": 160})
    up = env.action_codes.index(UP)
    assert [env.step(up)[1:4] for _ in range(2)] == [(0, False, False)] * 2
    assert not env.succeeded
    _, reward, terminated, truncated, info = env.step(up)
    assert (reward, terminated, truncated) == (1, False, False)
    assert info["success"]
    assert info["frame"] == 172
    assert info["score"] == 1
    _, _, terminated, truncated, info = env.step(up)
    assert (terminated, truncated, info["end"]) == (True, False, "SUCCESS")
    assert info["frame"] == 173  # one extra frame


def test_extra_frames_are_log_uniform(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, extra_frames=80)
    drawn = []
    for seed in range(800):
        env.reset(seed=seed, options={"start": 168})
        drawn.append(env._extra)
    assert min(drawn) == 1
    assert 60 < max(drawn) < 80
    # floor(80^U) is below 9 with the chance log 9 / log 80
    assert np.mean(np.array(drawn) < 9) == pytest.approx(math.log(9) / math.log(80), abs=0.05)


def test_extra_frames_are_played_after_a_success(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, extra_frames=80)
    for seed in range(5):
        env.reset(seed=seed, options={"start": 168})
        extra = env._extra
        assert play_on(env, UP) == 1
        assert (env.end, env.frame) == (End.SUCCESS, 172 + extra)


@pytest.mark.parametrize("lag", [0, 3, 8])
def test_who_does_not_score_within_the_lag_is_behind(freeway: Demo, lag: int) -> None:
    env = DemoResetEnv(freeway, lag_frames=lag)
    env.reset(options={"start": 152})
    assert play_on(env, NOTHING) == 0
    assert (env.end, env.frame, env.succeeded) == (End.BEHIND, 172 + lag, False)


@pytest.fixture
def deadly(assault: Demo) -> Demo:
    """As if a life were lost at 280 and the only point were the last: who shoots dies at 258."""
    lives, rewards = assault.lives.copy(), np.zeros(300, np.int32)
    lives[279:] -= 1
    rewards[299] = 1
    return replace(assault, lives=lives, rewards=rewards)


@pytest.mark.parametrize(
    ("lag", "ends", "end"),
    [
        (21, True, (End.LIFE_LOST, 258)),
        (22, True, (End.BEHIND, 322)),  # up to 258 + 22 the demo loses one, too
        (21, False, (End.BEHIND, 321)),
    ],
)
def test_a_life_ends_it_unless_the_demo_loses_one_there(
    assault: Demo, deadly: Demo, lag: int, ends: bool, end: tuple[End, int]
) -> None:
    states = start_states(assault, View(), 4)
    env = DemoResetEnv(deadly, states=states, lag_frames=lag, life_loss_ends=ends)
    env.reset(options={"start": 0})
    play_on(env, FIRE)
    assert (env.end, env.frame) == end


def test_the_demo_itself_is_never_ended_early(assault: Demo) -> None:
    env = DemoResetEnv(assault.prefix(228), lag_frames=0)
    for start in (0, 100, 216):
        env.reset(options={"start": start})
        up = env.action_codes.index(UP)
        while env.frame < 220:
            env.play(up)
            assert not env.end
        env.play(up)
        assert env.succeeded


@pytest.mark.parametrize(
    ("start", "horizon", "end"),
    [
        (48, 6, (End.HORIZON, 54)),  # the first reward at 54 or later
        (48, 7, (End.HORIZON, 144)),
        (140, 60, (End.SUCCESS, 225)),  # the last one: the real goal
        (140, 400, (End.SUCCESS, 225)),
        (0, 6, (End.SUCCESS, 225)),  # from the game's own start nothing less counts
    ],
)
def test_a_horizon_is_a_goal_nearby(
    assault: Demo, start: int, horizon: int, end: tuple[End, int]
) -> None:
    env = DemoResetEnv(assault.prefix(228), horizon_frames=horizon, extra_frames=1)
    env.reset(options={"start": start})
    play_on(env, UP)
    assert env.succeeded
    assert (env.end, env.frame) == end


def slow_goal(scores: list[int], start: int, horizon: int) -> int:
    """The first frame beyond the horizon right after a gain, with more than at the start."""
    end = len(scores) - 1
    for frame in range(min(start + horizon, end), end + 1):
        if frame and scores[frame] > max(scores[frame - 1], scores[start]):
            return frame
    return end


@given(
    rewards=st.lists(st.sampled_from([0, 0, 1, 5, -2]), min_size=2, max_size=30),
    start=st.integers(1, 29),
    horizon=st.integers(1, 40),
)
@settings(deadline=None)
def test_a_goal_nearby_is_more_than_there_is_already(
    freeway: Demo, rewards: list[int], start: int, horizon: int
) -> None:
    start = min(start, len(rewards) - 1)
    demo = replace(freeway.prefix(len(rewards)), rewards=np.array(rewards, np.int32))
    judge = Judge(demo, Rules())
    scores = [0, *np.cumsum(rewards).tolist()]
    assert judge.goal(start, horizon) == slow_goal(scores, start, horizon)
    assert judge.goal(0, horizon) == judge.goal(start, None) == len(rewards)


def test_a_horizon_truncates(assault: Demo) -> None:
    env = DemoResetEnv(assault.prefix(228), horizon_frames=2)
    env.reset(options={"start": 52})
    _, _, terminated, truncated, _ = env.step(env.action_codes.index(UP))
    assert (terminated, truncated) == (False, True)


def test_max_frames_truncates_in_the_middle_of_a_decision(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, max_frames=10)
    env.reset(options={"start": 20})
    steps = [env.step(0)[2:4] for _ in range(3)]
    assert steps == [(False, False), (False, False), (False, True)]
    assert (env.end, env.frame) == (End.FRAMES, 30)


def test_an_end_at_a_decisions_last_frame_looks_as_if_it_went_on(freeway: Demo) -> None:
    """What a cut episode would have been worth is told from its last picture."""
    cut, whole = DemoResetEnv(freeway, max_frames=8), DemoResetEnv(freeway)
    for env in (cut, whole):
        env.reset(options={"start": 20})
        for _ in range(2):
            env.play(env.action_codes.index(UP))
    assert (cut.end, whole.end) == (End.FRAMES, End.NONE)
    np.testing.assert_array_equal(cut.observation, whole.observation)


def test_the_emulator_ends_it() -> None:
    kaboom = record("kaboom", np.full(676, 1, np.uint8), frame_skip=4)
    env = DemoResetEnv(kaboom)
    env.reset(options={"start": 660, "limits": False})
    play_on(env, 1)
    assert (env.end, env.frame) == (End.GAME_OVER, 674)
    # A game that is over costs a life in the same frame; the emulator has the first word.
    env = DemoResetEnv(kaboom.prefix(528), lag_frames=400)
    env.reset(options={"start": 524})
    env._goal_score = 100
    play_on(env, 1)
    assert env.end is End.GAME_OVER


def test_without_limits_neither_success_nor_lag_nor_lives_end_it(
    freeway: Demo, assault: Demo
) -> None:
    env = DemoResetEnv(freeway, lag_frames=1, extra_frames=1)
    env.reset(options={"start": 168, "limits": False})
    for _ in range(20):
        env.play(env.action_codes.index(UP))
    assert env.succeeded
    assert env.end is End.NONE
    env.reset(options={"start": 160, "limits": False})
    for _ in range(20):
        env.play(env.action_codes.index(NOTHING))
    assert not env.succeeded
    assert env.end is End.NONE
    env = DemoResetEnv(assault.prefix(228), lag_frames=0, max_frames=264)
    env.reset(options={"limits": False})
    play_on(env, FIRE)
    assert (env.end, env.emulator.lives()) == (End.FRAMES, 3)


def slow_floor(scores: list[int], lag: int, frame: int) -> int:
    """The least score on course at a frame: the demo's lowest within `lag` frames around it.

    What it has at its end it has for ever after; and who has that already is never behind.
    """
    around = range(frame - lag, frame + lag + 1)
    return min([scores[min(max(0, at), len(scores) - 1)] for at in around] + scores[-1:])


@given(
    rewards=st.lists(st.sampled_from([0, 0, 0, 1, 5, -2]), min_size=1, max_size=30),
    lag=st.integers(0, 40),
)
@settings(deadline=None)
def test_the_lag_rule_is_the_lowest_score_around(
    freeway: Demo, rewards: list[int], lag: int
) -> None:
    demo = replace(
        freeway.prefix(len(rewards)),
        rewards=np.array(rewards, np.int32),
    )
    judge = Judge(demo, Rules(lag_frames=lag))
    scores = [0, *np.cumsum(rewards).tolist()]
    for frame in range(len(rewards) + 2 * lag + 3):
        floor = slow_floor(scores, lag, frame)
        assert not judge.behind(frame, floor), frame
        assert judge.behind(frame, floor - 1), frame


@given(
    lives=st.lists(st.integers(0, 4), min_size=1, max_size=25),
    lag=st.integers(0, 30),
    data=st.data(),
)
@settings(deadline=None)
def test_lives_that_the_demo_loses_may_be_lost(
    freeway: Demo, lives: list[int], lag: int, data: st.DataObject
) -> None:
    demo = replace(freeway.prefix(len(lives)), lives=np.array(lives, np.int16))
    judge = Judge(demo, Rules(lag_frames=lag))
    start = data.draw(st.integers(0, len(lives) - 1))
    frame = data.draw(st.integers(start, len(lives) + lag))
    lost = 0
    for played in range(max(start, 1), min(frame + lag, len(lives))):
        lost += max(0, lives[played - 1] - lives[played])
    assert judge.allowed_losses(start, frame) == lost


def test_rewards_are_signs_or_scaled_by_the_demo(assault: Demo) -> None:
    for scaled, total in ((False, 4.0), (True, 4.0)):
        env = DemoResetEnv(assault.prefix(228), scaled_reward=scaled, extra_frames=1)
        env.reset(options={"start": 52})
        assert play_on(env, UP) == pytest.approx(total)
        assert env.score == 84
    uneven = replace(assault.prefix(228), rewards=assault.prefix(228).rewards * 4)
    states = start_states(assault.prefix(228), View(), 4)
    env = DemoResetEnv(uneven, states=states, scaled_reward=True)
    env.reset(options={"start": 52})
    assert env.play(env.action_codes.index(UP)) == pytest.approx(21 / 84)


def test_an_episode_has_the_demos_score_at_its_start(assault: Demo) -> None:
    env = DemoResetEnv(assault)
    env.reset(options={"start": 200})
    assert env.score == 63
    while env.frame < 224:
        env.play(env.action_codes.index(UP))
    assert env.score == 84


@pytest.mark.parametrize("settings", [{"sticky_probability": 0.5}, {"no_ops": 30}])
def test_randomness_comes_from_the_seed_alone(freeway: Demo, settings: dict[str, Any]) -> None:
    env = DemoResetEnv(freeway, max_frames=48, **settings)

    def episode(seed: int) -> tuple[bytes, bytes]:
        env.reseed(seed)
        env.begin(0)
        first = env.observation.tobytes()
        random = np.random.default_rng(0)
        while not env.end:
            env.play(int(random.integers(3)))
        return first, env.emulator.ram().tobytes()

    # From the same screen before, so that this is about the random numbers alone.
    seen: dict[int, tuple[bytes, bytes]] = {}
    for seed in (1, 2, 3, 4, 1, 2, 3, 4):
        env.begin(100)
        env.play(0)
        result = episode(seed)
        assert seen.setdefault(seed, result) == result
    assert len({ram for _, ram in seen.values()}) > 1


def test_sticky_actions_repeat_the_frame_before(
    freeway: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = DemoResetEnv(freeway, sticky_probability=0.25)
    played: list[int] = []
    act = env.emulator.act

    def write_down(code: int) -> int:
        played.append(code)
        return int(act(code))

    monkeypatch.setattr(env.emulator, "act", write_down)
    env.reseed(7)
    env.begin(80, limits=False)
    wanted = []
    choices = np.random.default_rng(1).integers(3, size=150)
    for action in choices.tolist():
        wanted += [env.action_codes[action]] * 4
        env.play(action)
    random = np.random.Generator(np.random.Philox(7))
    random.random()  # the extra frames
    last, expected = UP, []  # the demo's action before frame 80
    for code in wanted:
        if random.random() >= 0.25:
            last = code
        expected.append(last)
    assert played == expected
    assert played != wanted


def test_a_sticky_probability_of_one_repeats_the_demo_for_ever(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, sticky_probability=1.0)
    env.reset(options={"start": 160})
    assert play_on(env, NOTHING) == 1


def test_no_ops_come_before_the_games_own_start_only(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, no_ops=30)
    emulator = Emulator("freeway")
    counts = set()
    for seed in range(12):
        env.reseed(seed)
        env.begin(0)
        assert (env.frame, env.score) == (0, 0)
        random = np.random.Generator(np.random.Philox(seed))
        random.random()
        count = int(random.integers(31))
        counts.add(count)
        emulator.reset()
        for _ in range(count):
            emulator.act(NOTHING)
        np.testing.assert_array_equal(env.emulator.ram(), emulator.ram())
    assert len(counts) > 5
    plain = DemoResetEnv(freeway)
    for one in (env, plain):
        one.begin(40)
    np.testing.assert_array_equal(env.emulator.ram(), plain.emulator.ram())


def test_a_decision_shows_the_maximum_of_its_last_frames(freeway: Demo) -> None:
    view = View()
    env = DemoResetEnv(freeway, view=view)
    env.begin(40)
    emulator = Emulator("freeway")
    camera = Camera(emulator, view)
    emulator.restore(env.states.state(10))
    before = env.observation.copy()
    for _ in range(4):
        emulator.act(NOTHING)
        camera.take()
    image = np.zeros((1, 64, 64), np.uint8)
    camera.image_into(image)
    observation = env.step(env.action_codes.index(NOTHING))[0]
    np.testing.assert_array_equal(observation[:3], before[1:])
    np.testing.assert_array_equal(observation[3:], image)


def test_what_it_returns_stays_as_it_was(freeway: Demo) -> None:
    env = DemoResetEnv(freeway)
    first, _ = env.reset(options={"start": 40})
    copy = first.copy()
    second = env.step(0)[0]
    kept = second.copy()
    env.step(0)
    np.testing.assert_array_equal(first, copy)
    np.testing.assert_array_equal(second, kept)


def test_all_18_actions_if_wanted(freeway: Demo) -> None:
    assert DemoResetEnv(freeway).action_codes == (0, 2, 5)
    env = DemoResetEnv(freeway, full_action_space=True)
    assert env.action_codes == tuple(range(18))
    assert env.action_space == gymnasium.spaces.Discrete(18)


@pytest.mark.parametrize("start", [-4, 2, 172, 400, 120.0, "120", None])
def test_a_start_that_is_no_decision_is_refused(freeway: Demo, start: object) -> None:
    env = DemoResetEnv(freeway)
    says = f"start: received {start!r}; .* multiple of 4 from 0 to 171"
    with pytest.raises(UserError, match=says):
        env.reset(options={"start": start})


def test_an_ended_episode_cannot_be_played(freeway: Demo) -> None:
    env = DemoResetEnv(freeway, max_frames=4)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset()
    env.step(0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)


@pytest.mark.parametrize(
    ("rules", "view"),
    [
        ({"no_ops": 30}, View()),
        ({"frame_skip": 1}, View()),
        ({"frame_skip": 2}, View(max_over_frames=4)),
    ],
)
def test_what_is_seen_does_not_depend_on_the_episode_before(
    freeway: Demo, rules: dict[str, Any], view: View
) -> None:
    env = DemoResetEnv(freeway, view=view, **rules)
    for seed in range(8):
        seen = []
        for before in (40, 160):
            env.begin(before)
            env.play(1)
            env.reseed(seed)
            env.begin(0)
            env.play(1)
            seen.append(env.observation.copy())
        np.testing.assert_array_equal(seen[0], seen[1])


def test_somebody_elses_learner_learns_on_it(freeway: Demo) -> None:
    """REINFORCE (Williams 1992) of what to press, whatever is seen: all it takes here."""
    env = gymnasium.make("DemoReset-v0", demo=freeway, lag_frames=24)
    random, logits, usual, paid = np.random.default_rng(0), np.zeros(3), 0.0, []
    for episode in range(120):
        env.reset(seed=episode, options={"start": 152})
        chances = np.exp(logits) / np.exp(logits).sum()
        score, direction, over = 0.0, np.zeros(3), False
        while not over:
            action = random.choice(3, p=chances)
            direction += np.eye(3)[action] - chances
            _, reward, terminated, truncated, _ = env.step(action)
            score, over = score + float(reward), terminated or truncated
        logits += 0.1 * (score - usual) * direction
        usual += 0.1 * (score - usual)
        paid.append(score)
    assert np.mean(paid[:20]) < 0.5
    assert np.mean(paid[-20:]) > 0.9


@pytest.mark.parametrize("lag", [0, 3, 60, 400, 100_000])
def test_the_floor_is_the_demos_lowest_score_within_the_lag(lag: int) -> None:
    demo = record("pong", np.zeros(800, np.uint8), frame_skip=4)  # it loses points
    assert demo.scores[-1] < 0
    judge = Judge(demo, Rules(lag_frames=lag))
    scores, end = demo.scores.tolist(), len(demo)
    for frame in [*range(end + 1), *range(end + 1, end + lag, 97), end + lag, end + lag + 1]:
        near = scores[max(0, frame - lag) : frame + lag + 1]
        wanted = min([*near, scores[-1]]) if frame < end + lag else scores[-1]
        assert judge.floor[min(frame, len(judge.floor) - 1)] == wanted, frame
