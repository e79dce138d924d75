"""Lessons from a demo: which actions, which weights, and what the policy sees with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from demoreset_api.spec import PolicySpec
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.curriculum import Guidance
from demoreset_trainer.demo import Demo
from demoreset_trainer.guide import AFTER, AROUND, Guide, decisions
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.states import start_states


@pytest.mark.parametrize(
    ("actions", "skip", "expected"),
    [
        ([2, 2, 2, 2, 5, 5, 5, 5], 4, [1, 2]),
        ([0, 2, 2, 2, 5, 0, 0, 5], 4, [1, 0]),  # the commonest; of equals the first code
        ([2, 2, 2, 2, 5, 5], 4, [1, 2]),  # the last decision is shorter
        ([3, 3, 3, 3, 2, 3, 2, 2], 4, [-1, 1]),  # an action that the policy does not have
        ([0, 2, 5], 1, [0, 1, 2]),
    ],
)
def test_a_decision_is_the_commonest_of_its_frames(
    freeway: Demo, actions: list[int], skip: int, expected: list[int]
) -> None:
    demo = replace(freeway.prefix(len(actions)), actions=np.array(actions, np.uint8))
    assert decisions(demo, skip, (0, 2, 5)).tolist() == expected


def teach(freeway: Demo) -> tuple[Guide, Policy, BurnIn, Demo]:
    torch.manual_seed(0)
    policy = Policy(architecture(PolicySpec(recurrent=True)), 3)
    policy.exact = True
    # Up, but down in the decision 20, and to the left, which the policy cannot, in 21.
    actions = freeway.actions.copy()
    actions[80:84], actions[84:88] = 5, 4
    demo = replace(freeway, actions=actions)
    states = start_states(freeway, policy.shape.view, 4)
    burn_in = BurnIn(policy, states, 4)
    burn_in.refresh()
    return Guide(demo, states, policy.shape.view, burn_in, (0, 2, 5)), policy, burn_in, demo


def test_a_lesson_shows_the_demo_around_the_frontier_and_after_it(freeway: Demo) -> None:
    guide, policy, burn_in, _ = teach(freeway)
    states = start_states(freeway, policy.shape.view, 4)
    weights = np.linspace(0.1, 0.9, 15)
    lesson = guide.lesson(Guidance(15, 25, weights), np.random.default_rng(3))
    assert lesson is not None
    random = np.random.default_rng(3)
    index = np.append(random.integers(15, 25, AROUND), random.integers(25, 30, AFTER))
    assert set(index) == set(range(15, 30))
    for row, decision in enumerate(index.tolist()):
        seen = states.observation(decision, policy.shape.view)
        np.testing.assert_array_equal(lesson.observations[row], seen)
        torch.testing.assert_close(lesson.states[row], burn_in.hidden[decision])
        if decision == 21:
            assert lesson.weights[row] == 0
            assert 0 <= lesson.actions[row] < 3
        else:
            assert lesson.actions[row] == (2 if decision == 20 else 1)
            assert lesson.weights[row] == pytest.approx(weights[decision - 15])


def test_after_the_demos_end_there_is_nothing_to_learn(freeway: Demo) -> None:
    guide, *_ = teach(freeway)
    random = np.random.default_rng(0)
    assert guide.lesson(Guidance(43, 60, np.ones(17)), random) is None
    assert guide.lesson(Guidance(10, 10, np.ones(0)), random) is None
    for guidance in (Guidance(40, 60, np.ones(20)), Guidance(40, 42, np.ones(2))):
        lesson = guide.lesson(guidance, random)
        assert lesson is not None
        assert len(lesson.actions) == AROUND
