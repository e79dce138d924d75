"""A rollout against one slot after the other, played by hand with single environments."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch

from demoreset_api.spec import PolicyPreset, PolicySpec
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.curriculum import Result
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import TRUNCATED, DemoResetEnv, Rules
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.ppo import Rollout
from demoreset_trainer.rollout import Collector, Start, sample
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import StartStates, start_states

SEED, TOTAL, LENGTH, HISTORY, UPDATES = 7, 5, 12, 3, 2
EXPLORE_FRAMES, EXPLORE_EVERY = 12, 2
RULES = Rules(sticky_probability=0.1, lag_frames=8, max_frames=40, extra_frames=5)


def choose(slot: int, episode: int, random: np.random.Generator) -> Start:
    return Start(int(random.integers(36, 43)) * 4, limits=episode % 3 > 0)


def make_policy(recurrent: bool) -> Policy:
    torch.manual_seed(2)
    policy = Policy(architecture(PolicySpec(preset=PolicyPreset.SMALL, recurrent=recurrent)), 3)
    policy.exact = True
    with torch.no_grad():  # not nearly uniform, or errors would hide
        policy.actor.weight.mul_(100)
        policy.actor.bias[1] = 1 if recurrent else 3  # upwards: some succeed
    return policy


@dataclass
class Setting:
    """A policy, the demo's states, and slots for a member."""

    demo: Demo
    policy: Policy
    states: StartStates
    burn_in: BurnIn
    slots: Slots = field(repr=False)
    parts: int

    def collector(self, block: range, *, explore_frames: int = EXPLORE_FRAMES) -> Collector:
        collector = Collector(
            self.slots,
            self.policy,
            self.burn_in,
            choose,
            seed=SEED,
            frame_skip=4,
            length=LENGTH,
            history=HISTORY,
            explore_frames=explore_frames,
            explore_every=EXPLORE_EVERY,
            parts=self.parts,
        )
        collector.hold(np.array(block), np.zeros(len(block), np.int64))
        return collector


@pytest.fixture(scope="module")
def slots(freeway: Demo) -> Iterator[Slots]:
    view = make_policy(False).shape.view
    with Slots(freeway, RULES, view, slots=TOTAL, processes=2) as slots:
        yield slots


@pytest.fixture(scope="module", params=[1, 2], ids=["together", "in two parts"])
def parts(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "recurrent"])
def setting(request: pytest.FixtureRequest, freeway: Demo, slots: Slots, parts: int) -> Setting:
    policy = make_policy(request.param)
    states = start_states(freeway, policy.shape.view, 4)
    burn_in = BurnIn(policy, states, HISTORY if policy.shape.hidden else 0)
    burn_in.refresh()
    return Setting(freeway, policy, states, burn_in, slots, parts)


@pytest.fixture(scope="module")
def collected(setting: Setting) -> list[tuple[Rollout, list[Result]]]:
    """Two updates of the slots 1, 2 and 3; the weights do not change in between."""
    collector = setting.collector(range(1, 4))
    gathered = []
    for update in range(UPDATES):
        rollout, results = collector.collect(update)
        gathered.append((deepcopy(rollout), results))
    return gathered


@dataclass
class Diary:
    """What one slot saw and did; a row for each decision."""

    rows: dict[str, list[npt.NDArray[np.float64]]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def add(self, **row: object) -> None:
        for name, value in row.items():
            self.rows.setdefault(name, []).append(np.array(value, np.float64))


@torch.no_grad()
def by_hand(setting: Setting, slot: int) -> Diary:
    """The slot's decisions of all updates, with its own environment."""
    policy, diary = setting.policy, Diary()
    env = DemoResetEnv(setting.demo, rules=RULES, view=policy.shape.view, states=setting.states)
    episode, start = -1, Start(0)
    ended = True
    for update in range(UPDATES):
        seeds = np.random.SeedSequence([SEED, TOTAL, update])
        table = np.random.Generator(np.random.Philox(seeds)).random((LENGTH, TOTAL), np.float32)
        for t in range(LENGTH):
            begins = ended
            if begins:
                episode += 1
                seeds = np.random.SeedSequence([SEED, slot, episode])
                random = np.random.Generator(np.random.Philox(seeds))
                start = choose(slot, episode, random)
                env.reseed(int(random.integers(2**62)))
                env.begin(start.frame, start.limits)
                state = setting.burn_in.hidden[start.frame // 4][None]
                age = 0
            seen = env.observation.copy()
            before = state
            logits, value, state = policy.step(torch.from_numpy(seen)[None], before)
            exploring = episode % EXPLORE_EVERY == 0 and age < EXPLORE_FRAMES // 4
            logit_scale = 0.5 if exploring else 1.0
            log_probs = (logits[0] * logit_scale).log_softmax(0)
            action, noise = 0, float(table[t, slot])
            while action < 2 and log_probs[: action + 1].exp().sum() <= noise:
                action += 1
            reward = env.play(action)
            age += 1
            end_value = 0.0
            if env.end in TRUNCATED:
                last = torch.from_numpy(env.observation)[None]
                end_value = float(policy.step(last, state)[1][0])
            diary.add(
                observations=seen,
                begins=begins,
                states=before[0].numpy(),
                actions=action,
                log_probs=float(log_probs[action]),
                values=float(value[0]),
                rewards=reward,
                ends=int(env.end),
                end_values=end_value,
                logit_scale=logit_scale,
            )
            ended = bool(env.end)
            if ended:
                diary.results.append(
                    Result(
                        slot, episode, start.frame, env.succeeded, env.score,
                        env.frame - start.frame, int(env.end), explored=episode % 2 == 0,
                    )
                )  # fmt: skip
        if not ended:
            after = torch.from_numpy(env.observation)[None]
            diary.add(last_values=float(policy.step(after, state)[1][0]))
        else:
            diary.add(last_values=np.nan)  # of no account
    return diary


def test_it_is_what_slots_do_by_hand(
    setting: Setting, collected: list[tuple[Rollout, list[Result]]]
) -> None:
    results: list[list[Result]] = [[], []]
    for column, slot in enumerate((1, 2, 3)):
        diary = by_hand(setting, slot)
        for update, (rollout, _) in enumerate(collected):
            part = slice(update * LENGTH, (update + 1) * LENGTH)
            for name, rows in diary.rows.items():
                got = getattr(rollout, name)
                if name == "last_values":
                    if not np.isnan(rows[update]):
                        assert got[column] == pytest.approx(float(rows[update]), abs=1e-3)
                    continue
                np.testing.assert_allclose(
                    got[-LENGTH:, column], rows[part], rtol=1e-3, atol=1e-4, err_msg=name
                )
        number = 0
        for update in range(UPDATES):
            count = int(
                np.count_nonzero(diary.rows["ends"][update * LENGTH : (update + 1) * LENGTH])
            )
            results[update] += diary.results[number : number + count]
            number += count
    assert [found for _, found in collected] == results
    ends = {result.end for update in results for result in update}
    assert len(ends) >= 3, "a test of few ends shows little"
    assert any(result.success for update in results for result in update)


def test_an_episode_begins_after_every_end(collected: list[tuple[Rollout, list[Result]]]) -> None:
    ended = np.ones(3, np.bool_)
    for rollout, results in collected:
        begins, ends = rollout.begins[-LENGTH:], rollout.ends
        np.testing.assert_array_equal(begins[0], ended)
        np.testing.assert_array_equal(begins[1:], ends[:-1] != 0)
        ended = ends[-1] != 0
        assert len(results) == np.count_nonzero(ends)
        truncated = np.isin(ends, [int(end) for end in TRUNCATED])
        assert not rollout.end_values[~truncated].any()
        assert rollout.end_values[truncated].all()


def test_the_policy_would_do_it_again(
    setting: Setting, collected: list[tuple[Rollout, list[Result]]]
) -> None:
    """Unrolled over the burn-in from its first state, every ratio is 1."""
    for rollout, _ in collected:
        with torch.no_grad():
            logits, values, _ = setting.policy.unroll(
                rollout.observations,
                rollout.states[0],
                torch.from_numpy(rollout.begins),
                rollout.states,
            )
        scaled = logits[-LENGTH:] * torch.from_numpy(rollout.logit_scale)[..., None]
        chosen = scaled.log_softmax(2).gather(2, torch.from_numpy(rollout.actions)[..., None])
        ratio = (chosen[..., 0] - torch.from_numpy(rollout.log_probs)).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)
        recorded = torch.from_numpy(rollout.values)
        torch.testing.assert_close(values[-LENGTH:], recorded, rtol=1e-3, atol=1e-3)


def test_the_burn_in_is_the_end_of_the_rollout_before(
    setting: Setting, collected: list[tuple[Rollout, list[Result]]]
) -> None:
    first, second = (rollout for rollout, _ in collected)
    rows = HISTORY if setting.policy.shape.hidden else 0
    assert len(first.observations) == len(second.observations) == rows + LENGTH
    if rows:
        assert not first.observations[:rows].any()
        for name in ("observations", "begins", "states"):
            kept = getattr(first, name)[-rows:]
            np.testing.assert_array_equal(getattr(second, name)[:rows], kept)


def test_who_explores_is_less_sure_of_itself(
    setting: Setting, collected: list[tuple[Rollout, list[Result]]]
) -> None:
    first = collected[0][0]
    assert (first.logit_scale[:3] == 0.5).all()  # episode 0, its first 12 frames
    assert (first.logit_scale[3] == 1).all()
    rollout, results = setting.collector(range(1, 4), explore_frames=0).collect(0)
    assert (rollout.logit_scale == 1).all()
    assert not any(result.explored for result in results)


def test_from_the_games_own_start_every_second_episode_plays_as_it_is(setting: Setting) -> None:
    collector = Collector(
        setting.slots, setting.policy, setting.burn_in,
        lambda slot, *_: Start(0 if slot < 2 else 160),
        seed=0, frame_skip=4, length=LENGTH, history=0, explore_frames=12, explore_every=1,
    )  # fmt: skip
    collector.hold(np.arange(4), np.array([6, 7, 6, 7]))
    rollout, _ = collector.collect(0)
    assert (rollout.logit_scale[:3] == [0.5, 1, 0.5, 0.5]).all()


def test_the_block_of_a_member_does_not_matter(
    setting: Setting, collected: list[tuple[Rollout, list[Result]]]
) -> None:
    """Slots 2 and 3 do the same as columns 1 and 2 of one block and 0 and 1 of another."""
    first = collected[0][0]
    other, results = setting.collector(range(2, 5)).collect(0)
    np.testing.assert_array_equal(other.observations[:, :2], first.observations[:, 1:])
    np.testing.assert_array_equal(other.actions[:, :2], first.actions[:, 1:])
    np.testing.assert_array_equal(other.ends[:, :2], first.ends[:, 1:])
    assert [one for one in results if one.slot < 4] == [
        one for one in collected[0][1] if one.slot > 1
    ]


def test_a_moved_curriculum_is_followed_at_once(setting: Setting) -> None:
    """Episodes that were planned before an update begin where it is after it."""
    where = 160
    asked: list[tuple[int, int]] = []

    def moving(slot: int, episode: int, random: np.random.Generator) -> Start:
        asked.append((slot, episode))
        return Start(where)

    collector = Collector(
        setting.slots, setting.policy, setting.burn_in, moving,
        seed=0, frame_skip=4, length=LENGTH, history=0, explore_frames=0, explore_every=1,
    )  # fmt: skip
    collector.hold(np.arange(3), np.array([5, 0, 9]))
    assert asked[:3] == [(0, 5), (1, 0), (2, 9)]
    _, results = collector.collect(0)
    assert {result.start for result in results} == {160}
    assert {result.episode for result in results if result.slot == 0} >= {5, 6}
    where = 164
    running = {(slot, int(collector.episodes[slot])) for slot in range(3)}
    _, results = collector.collect(1)
    assert results
    for result in results:
        assert result.start == (160 if (result.slot, result.episode) in running else 164)
    assert {result.start for result in results} == {160, 164}


def test_a_sample_inverts_the_distribution() -> None:
    log_probs = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    for noise, action in [(0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (0.9999, 3)]:
        assert sample(log_probs, torch.tensor([noise])).item() == action
    # Rounding may leave the last step of the ladder a little below 1.
    short = torch.tensor([[0.3, 0.3, 0.3]]).log()
    assert sample(short, torch.tensor([0.95])).item() == 2
    random = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    actions = sample(log_probs.expand(20_000, 4), random)
    shares = torch.bincount(actions, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.0, 0.5, 0.3]), rtol=0, atol=0.015)
