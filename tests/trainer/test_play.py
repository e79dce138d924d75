"""Playing without learning: every episode once, the same for any number of slots."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from demoreset_api.spec import PolicyPreset, PolicySpec
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import DemoResetEnv, End, Rules
from demoreset_trainer.play import Act, Played, choose, play
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.states import start_states

RULES = Rules(sticky_probability=0.1, lag_frames=8, max_frames=60, extra_frames=5)
BEGINS = [Begin(start, seed) for seed, start in enumerate((136, 160, 0, 168, 152, 144, 164))]


def make_policy() -> Policy:
    torch.manual_seed(2)
    policy = Policy(architecture(PolicySpec(preset=PolicyPreset.SMALL, recurrent=True)), 3)
    policy.exact = True
    with torch.no_grad():
        policy.actor.weight.mul_(100)
    return policy


VIEW = make_policy().shape.view


@pytest.fixture(scope="module")
def three(freeway: Demo) -> Iterator[Slots]:
    with Slots(freeway, RULES, VIEW, slots=3, processes=1) as slots:
        yield slots


@torch.no_grad()
def by_hand(
    demo: Demo, policy: Policy, hidden: torch.Tensor | None, epsilon: float
) -> list[Played]:
    """Episode after episode with one environment."""
    env = DemoResetEnv(demo, rules=RULES, view=VIEW)
    played = []
    for episode, begin in enumerate(BEGINS):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([11, episode])))
        env.reseed(begin.seed)
        env.begin(begin.start)
        state = torch.zeros(1, 256) if hidden is None else hidden[episode][None]
        while not env.end:
            logits, _, state = policy.step(torch.from_numpy(env.observation)[None], state)
            noise, dice = random.random(2)
            cumulative = np.cumsum(logits[0].softmax(0).numpy())
            action = min(2, int(np.count_nonzero(cumulative <= noise)))
            if dice < epsilon:
                action = int(dice / epsilon * 3)
            env.play(action)
        played.append(
            Played(env.score, env.highest, env.frame - begin.start, env.succeeded, int(env.end))
        )
    return played


@pytest.mark.parametrize("epsilon", [0.0, 0.4])
def test_every_episode_is_played_once_as_by_hand(
    freeway: Demo, three: Slots, epsilon: float
) -> None:
    policy = make_policy()
    told: list[int] = []
    played = play(three, policy, BEGINS, epsilon=epsilon, seed=11, watch=told.append)
    assert played == by_hand(freeway, policy, None, epsilon)
    assert told == [1, 2, 3, 4, 5, 6, 7]
    assert len({one.end for one in played}) > 1


def test_the_number_of_slots_changes_nothing(freeway: Demo, three: Slots) -> None:
    policy = make_policy()
    expected = play(three, policy, BEGINS, epsilon=0.2, seed=11)
    for count in (1, 9):  # fewer than before, and more than there are episodes
        with Slots(freeway, RULES, VIEW, slots=count, processes=1) as slots:
            assert play(slots, policy, BEGINS, epsilon=0.2, seed=11) == expected


def test_a_policy_may_remember_the_demo_before_its_start(freeway: Demo, three: Slots) -> None:
    policy = make_policy()
    burn_in = BurnIn(policy, start_states(freeway, VIEW, 4), 8)
    burn_in.refresh()
    known = burn_in.at(np.array([begin.start // 4 for begin in BEGINS]))
    played = play(three, policy, BEGINS, seed=11, states=known)
    assert played == by_hand(freeway, policy, known, 0.0)


def test_an_always_random_player_is_uniform() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0, 0.0]]).expand(20_000, 5)
    noise = np.random.default_rng(0).random((20_000, 2))
    for act in Act:
        actions = choose(logits, noise, act, 1.0)
        np.testing.assert_allclose(np.bincount(actions) / 20_000, 0.2, atol=0.012)
    sometimes = choose(logits, noise, Act.ARGMAX, 0.25)
    shares = np.bincount(sometimes, minlength=5) / 20_000
    np.testing.assert_allclose(shares, [0.8, 0.05, 0.05, 0.05, 0.05], atol=0.012)
    assert not choose(logits, noise, Act.SAMPLED, 0.0).any()


@pytest.mark.parametrize(
    ("act", "shares"),
    [
        (Act.SAMPLED, [0.6, 0.3, 0.1]),
        (Act.SHARPENED, [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]),
        (Act.ARGMAX, [1.0, 0.0, 0.0]),
    ],
)
def test_ways_to_act(act: Act, shares: list[float]) -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(20_000, 3)
    noise = np.random.default_rng(1).random((20_000, 2))
    actions = choose(logits, noise, act, 0.0)
    np.testing.assert_allclose(np.bincount(actions, minlength=3) / 20_000, shares, atol=0.012)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_no_noise_leads_out_of_the_actions(noise: float) -> None:
    both = np.array([[noise, noise]])
    for act in Act:
        for epsilon in (0.0, 0.3, 1.0):
            assert choose(torch.zeros(1, 3), both, act, epsilon)[0] in range(3)


def test_episodes_without_limits_end_by_frames_alone(three: Slots) -> None:
    begins = [Begin(168, seed, limits=False) for seed in range(4)]
    played = play(three, make_policy(), begins)
    assert [(one.end, one.frames) for one in played] == [(End.FRAMES, 60)] * 4
