"""Many slots as a gymnasium vector environment, for learners that are not ours.

envs = gymnasium.make_vec(
    "DemoReset-v0", num_envs=64, demo="montezuma-first-key",
    choose_start=lambda slot, random: 300,
)
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from demoreset_api.errors import UserError
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import (
    TRUNCATED,
    DemoResetEnv,
    End,
    Rules,
    check_actions,
    check_options,
    check_start,
)
from demoreset_trainer.machine import cores
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.states import View
from demoreset_trainer.streams import seed_from, stream

Images = npt.NDArray[np.uint8]
ChooseStart = Callable[[int, np.random.Generator], int]  # (slot, random) to a frame of the demo


class DemoResetVectorEnv(VectorEnv[Images, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """`num_envs` slots in processes; an episode that ends is followed by the next in the same step.

    Infos of a step in which episodes ended: `final_obs` (what each saw last), and `final_info` with
    arrays `start`, `frame`, `score`, `success`, `end`; `_final_obs` and `_final_info` say where.

    Args:
        demo: As for `DemoResetEnv`.
        num_envs: Slots.
        processes: Default: the cores that this process may use.
        choose_start: Asked for the start of every episode; it must be a multiple of the frame
            skip. Default: the start that `reset` was given, or the game's own.
        rules: What an episode is; single fields can be given as keywords, too.
        view: What an observation is.
        **settings: Fields of `Rules`.
    """

    def __init__(
        self,
        demo: Demo | Path | str,
        num_envs: int = 1,
        *,
        processes: int | None = None,
        choose_start: ChooseStart | None = None,
        rules: Rules | None = None,
        view: View | None = None,
        **settings: Any,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs: received {num_envs}; it is 1 or more")
        self.demo = demos.resolve(demo)
        rules, view = replace(rules or Rules(), **settings), view or View()
        one = DemoResetEnv(self.demo, rules=rules, view=view)
        self.metadata = {**one.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs = num_envs
        self.single_observation_space = one.observation_space
        self.single_action_space = one.action_space
        self.observation_space = batch_space(one.observation_space, num_envs)
        self.action_space = batch_space(one.action_space, num_envs)
        self.action_codes = one.action_codes
        self._skip = rules.frame_skip
        self._choose = choose_start
        self._starts = np.zeros(num_envs, np.int64)
        self._limits, self._begun = True, False
        self._episodes = np.zeros(num_envs, np.int64)
        # As gymnasium has it: whoever gives no seed gets other episodes each time.
        self._seeds = [seed_from(np.random.default_rng())] * num_envs
        self._planned = np.zeros(num_envs, np.int64)  # starts of the next episodes
        self._running = np.zeros(num_envs, np.int64)  # and of those that are played
        self._slots = Slots(self.demo, rules, view, slots=num_envs, processes=processes or cores())

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Images, dict[str, Any]]:
        """Begin an episode in every slot.

        `options["start"]`: a frame, or one for each slot; `options["limits"]` False: only the
        emulator ends episodes.

        A seed is for all slots, or a list has one for each; None: its stream goes on.

        Raises:
            UserError: a start is not a decision boundary inside the demo, a seed is negative, there
                are too few or too many of them, or an option is none.
        """
        self._reseed(seed if isinstance(seed, list) else [seed] * self.num_envs)
        options = options or {}
        check_options(options)
        starts = np.asarray(options.get("start", 0))
        if starts.shape not in ((), (self.num_envs,)):
            raise UserError(f"start: {starts.size} of them; it is one, or one for each slot")
        starts = np.broadcast_to(starts, self.num_envs)
        for start in starts.tolist():
            check_start(start, self.demo, self._skip)
        self._starts[:] = starts
        self._limits = bool(options.get("limits", True))
        begins = [self._begin(slot) for slot in range(self.num_envs)]
        self._slots.reset(begins)
        self._planned[:] = [begin.start for begin in begins]
        for slot in range(self.num_envs):
            self._enter(slot)
        self._begun = True
        return self._slots.observation.copy(), {"start": self._running.copy()}

    def _reseed(self, seeds: list[int | None]) -> None:
        """Begin the streams of the slots that have a seed; of the same one each has its own."""
        if len(seeds) != self.num_envs:
            raise UserError(f"seed: {len(seeds)} of them; it is one, or one for each slot")
        for slot, seed in enumerate(seeds):
            if seed is None:
                continue
            if seed < 0:
                raise UserError(f"seed: received {seed}; it is 0 or more")
            self._seeds[slot], self._episodes[slot] = seed, 0

    def _begin(self, slot: int) -> Begin:
        random = stream(self._seeds[slot], slot, int(self._episodes[slot]))
        start = int(self._starts[slot])  # `reset` has looked at it
        if self._choose is not None:
            start = self._choose(slot, random)
            check_start(start, self.demo, self._skip)
        return Begin(start, seed_from(random), self._limits)

    def _enter(self, slot: int) -> None:
        """The slot's episode has begun: say where its next one will."""
        self._running[slot] = self._planned[slot]
        self._episodes[slot] += 1
        begin = self._begin(slot)
        self._slots.plan(slot, begin)
        self._planned[slot] = begin.start

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Images, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], dict[str, Any]]:
        """Play one decision in every slot.

        Raises:
            UserError: there is no such action, or not one for every slot.
            gymnasium.error.ResetNeeded: no episode has begun.
            gymnasium.error.ClosedEnvironmentError: it is closed.
        """
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("it is closed: make another one")
        if not self._begun:
            raise gymnasium.error.ResetNeeded("no episode has begun: call reset() first")
        if np.shape(actions) != (self.num_envs,):
            raise UserError(
                f"actions: received an array of shape {np.shape(actions)}; it is one for each of "
                f"the {self.num_envs} slots"
            )
        check_actions(np.asarray(actions).tolist(), len(self.action_codes))
        slots = self._slots
        slots.action[:] = actions
        slots.send()
        slots.wait()
        ended = slots.end != End.NONE
        truncated = np.isin(slots.end, list(TRUNCATED))
        infos: dict[str, Any] = {}
        if ended.any():
            infos = {
                "final_obs": slots.last_observation.copy(),
                "_final_obs": ended,
                "final_info": {
                    "start": self._running.copy(),
                    "score": slots.score.copy(),
                    "frame": slots.frame.copy(),
                    "success": slots.success.copy(),
                    "end": np.array([End(end).name for end in slots.end.tolist()]),
                },
                "_final_info": ended,
            }
            for slot in np.flatnonzero(ended).tolist():
                self._enter(slot)
        return (
            slots.observation.copy(),
            slots.reward.astype(np.float64),
            ended & ~truncated,
            truncated,
            infos,
        )

    def close_extras(self, **_: Any) -> None:
        """End the processes."""
        self._slots.close()
