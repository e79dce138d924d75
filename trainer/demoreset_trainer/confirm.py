"""Playing the goal's episodes, near the goal, with the policy held still."""

from collections.abc import Callable, Sequence

import numpy as np

from demoreset_trainer.play import play
from demoreset_trainer.policy import Policy
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.streams import seed_from

MAX_SLOTS = 32


class _Stopped(Exception):
    """Told to stop, in the middle of an episode."""


class Confirmation:
    """The goal's episodes, shared out among the members.

    In slots of their own: if the training's were used, all of their episodes would begin anew at
    the same moment, and the rollouts after a failed confirmation would be of one kind.

    Args:
        policy: As it is at the time.
        make_slots: Makes so many environments, once.
        episodes: How many are played.
        seed: Of the run.
        alive: Told that the loop moves.
        watch: Told when an episode has ended.
    """

    def __init__(
        self,
        policy: Policy,
        make_slots: Callable[[int], Slots],
        *,
        episodes: int,
        seed: int,
        alive: Callable[[], None],
        watch: Callable[[], None],
    ) -> None:
        self._policy, self._make_slots = policy, make_slots
        self._episodes, self._seed = episodes, seed
        self._alive, self._watch = alive, watch
        self._slots: Slots | None = None

    def share(
        self, update: int, me: str, members: Sequence[str], stopping: Callable[[], bool]
    ) -> list[bool]:
        """Play my share, as one of these members; which of its episodes tied the demo.

        Each episode draws from the stream of its number, so that all of them are the same for any
        number of members, and new ones at every confirmation. None of them where it is alone and
        told to stop meanwhile: they may be long. Others would have played theirs in vain.
        """
        alone = len(members) == 1
        random = np.random.default_rng([self._seed, update])
        begins = [Begin(0, seed_from(random)) for _ in range(self._episodes)]
        seed = seed_from(random)
        mine = range(members.index(me), self._episodes, len(members))
        if not mine or (alone and stopping()):
            return []
        if self._slots is None:  # as few as make as many rounds: the last is as full as the others
            rounds = -(-len(mine) // MAX_SLOTS)
            self._slots = self._make_slots(-(-len(mine) // rounds))

        def alive() -> None:
            self._alive()
            if alone and stopping():
                raise _Stopped

        try:
            played = play(
                self._slots,
                self._policy,
                [begins[number] for number in mine],
                numbers=mine,
                seed=seed,
                watch=lambda _: self._watch(),
                alive=alive,
            )
        except _Stopped:
            return []
        return [episode.success for episode in played]
