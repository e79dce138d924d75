"""The guide: the demo's own actions, most of them around the frontier, as lessons for the policy.

Imitation, and said so wherever a result used it: a cross entropy that is weighted by 1 - success of
each start, so that it fades by itself where the policy has learned to do without.
"""

import numpy as np
import numpy.typing as npt

from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.curriculum import Guidance
from demoreset_trainer.demo import Demo
from demoreset_trainer.ppo import Lesson
from demoreset_trainer.states import StartStates, View

AROUND, AFTER = 48, 24  # decisions of the demo in one lesson: around the frontier, and after it


class Guide:
    """Makes lessons from a demo."""

    def __init__(
        self, demo: Demo, states: StartStates, view: View, burn_in: BurnIn, codes: tuple[int, ...]
    ) -> None:
        self._states = states
        self._view = view
        self._burn_in = burn_in
        self._actions = decisions(demo, states.frame_skip, codes)

    def lesson(self, guidance: Guidance, random: np.random.Generator) -> Lesson | None:
        """Demo decisions, drawn around the frontier and over all after; None where there are none.

        Without those after, what the policy does there drifts to what suits earlier places that
        look alike: it took the sword, and ran back to where the sword had been.
        """
        end = min(guidance.first + len(guidance.weights), len(self._actions))
        after = min(guidance.after, end)
        if after <= guidance.first:
            return None
        index = random.integers(guidance.first, after, AROUND)
        if end > after:
            index = np.concatenate([index, random.integers(after, end, AFTER)])
        actions = self._actions[index]
        weights = guidance.weights[index - guidance.first] * (actions >= 0)
        return Lesson(
            observations=self._states.observations(index, self._view),
            states=self._burn_in.at(index),
            actions=actions.clip(0),
            weights=weights.astype(np.float32),
        )


def decisions(demo: Demo, frame_skip: int, codes: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The demo's action per decision, as an index into `codes`: the commonest of its frames.

    -1 where the demo used an action that the policy does not have.
    """
    index = {code: number for number, code in enumerate(codes)}
    result = []
    for first in range(0, len(demo), frame_skip):
        counts = np.bincount(demo.actions[first : first + frame_skip])
        result.append(index.get(int(counts.argmax()), -1))
    return np.array(result, np.int64)
