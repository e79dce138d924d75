"""One slot: a game that can begin anywhere inside a demonstration, as a gymnasium environment.

    env = gymnasium.make("DemoReset-v0", demo="montezuma-first-key")
    observation, info = env.reset(options={"start": 240})

An episode ends (`info["end"]`) by one of `End`. Positions are frames of the demo, and the episode's
own: it starts at `start` and is at `start` + frames played afterwards.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from demoreset_api.errors import UserError
from demoreset_trainer import demo as demos
from demoreset_trainer.demo import UNKNOWN_LIVES, Demo
from demoreset_trainer.emulator import ALL_ACTIONS, take
from demoreset_trainer.states import Camera, Image, StartStates, View, start_states
from demoreset_trainer.streams import stream

NOOP = 0


class End(IntEnum):
    """How an episode ended; NONE while it runs."""

    NONE = 0
    GAME_OVER = 1  # the emulator says so
    LIFE_LOST = 2  # more lives lost than the demo loses there
    SUCCESS = 3  # the goal's score was reached, and the extra frames are over
    BEHIND = 4  # no longer within `lag_frames` of the demo's score
    HORIZON = 5  # the local goal was reached: the future is not judged, but bootstrapped
    FRAMES = 6  # `max_frames` were played


TRUNCATED = frozenset({End.HORIZON, End.FRAMES})
LEAST = {  # of the whole numbers among `Rules`
    "frame_skip": 1,
    "no_ops": 0,
    "lag_frames": 0,
    "extra_frames": 1,
    "horizon_frames": 1,
    "max_frames": 1,
}
EITHER = ("life_loss_ends", "full_action_space", "scaled_reward")  # the truth values among them


@dataclass(frozen=True)
class Rules:
    """What an episode is. Frames are emulator frames."""

    frame_skip: int = 4
    sticky_probability: float = 0.0  # per frame
    no_ops: int = 0  # most of them, uniform, before the game's own start
    life_loss_ends: bool = True
    lag_frames: int = 240
    extra_frames: int = 80  # most of them after a success, log-uniform from 1
    horizon_frames: int | None = None  # judge a start inside the demo at the first reward later
    max_frames: int | None = None
    full_action_space: bool = False
    scaled_reward: bool = False  # divide by the demo's mean absolute reward, instead of the sign

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: names the field.
        """
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UserError(f"{name}: received {value!r}; it is a whole number from {least} on")
        for name in EITHER:
            if (value := getattr(self, name)) not in (True, False):
                raise UserError(f"{name}: received {value!r}; it is True or False")
        if not 0 <= self.sticky_probability <= 1:
            raise UserError(
                f"sticky_probability: received {self.sticky_probability!r}; it is from 0 to 1"
            )


class Judge:
    """The demo's scores and lives, made ready to be looked up at every frame."""

    def __init__(self, demo: Demo, rules: Rules) -> None:
        scores = demo.scores
        lag, end = rules.lag_frames, len(demo)
        # The least score that is still on course at each frame: the demo's lowest within `lag`
        # frames around it (a demo may lose points again). After the end the final score counts.
        near = min(lag, len(scores))  # a window that is wider holds the same
        padded = np.concatenate(
            [np.full(near, scores[0]), scores, np.full(near + 1, np.iinfo(np.int64).max)]
        )
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * near + 1)
        floor = windows.min(axis=1)
        floor = np.minimum(floor, scores[-1])
        least = np.minimum.accumulate(scores[::-1])[::-1].tolist()  # from a frame to the end
        tail = [least[max(0, frame - lag)] for frame in range(len(floor), end + lag)]
        self.floor: list[int] = [*floor.tolist(), *tail, int(scores[-1])]
        self.scores: list[int] = scores.tolist()
        lives = demo.lives.astype(np.int64)
        drops = np.maximum(0, -np.diff(lives, prepend=lives[:1]))
        drops[lives == UNKNOWN_LIVES] = 0
        self.lives_lost: list[int] = np.concatenate([[0], np.cumsum(drops)]).tolist()
        self._lag = lag
        self._end = end
        self._gains = np.flatnonzero(demo.rewards > 0) + 1  # frames right after them
        self._gained = scores[self._gains]

    def goal(self, start: int, horizon: int | None) -> int:
        """The frame whose score an episode from `start` must tie.

        From the game's own start it is the demo's end: that is what a run is to learn. Within a
        horizon it is the next gain that leaves more than there was at `start`, else the demo's end:
        a score that is there already teaches nothing.
        """
        if horizon is None or start == 0:
            return self._end
        near = self._gains >= min(start + horizon, self._end)
        later = self._gains[near & (self._gained > self.scores[start])]
        return int(later[0]) if len(later) else self._end

    def behind(self, frame: int, score: int) -> bool:
        """Whether a score at `frame` is further behind the demo than the lag allows."""
        return score < self.floor[min(frame, len(self.floor) - 1)]

    def allowed_losses(self, start: int, frame: int) -> int:
        """Lives that the demo has lost since `start`, at most `lag` frames after `frame`."""
        return self.lives_lost[min(frame + self._lag, self._end)] - self.lives_lost[start]


def check_actions(actions: Iterable[Any], count: int) -> None:
    """Refuse actions that a game of so many has not.

    Raises:
        UserError: names the first of them.
    """
    for action in actions:
        try:
            known = 0 <= index(action) < count
        except TypeError:  # no whole number
            known = False
        if not known:
            raise UserError(f"action: received {action}; this game's are 0 to {count - 1}")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what `reset` does not know.

    Raises:
        UserError: names it.
    """
    if (limits := options.get("limits", True)) not in (True, False):
        raise UserError(f"limits: received {limits!r}; it is True or False")
    if unknown := options.keys() - {"start", "limits"}:
        raise UserError(f"options: received {', '.join(unknown)}; known are start and limits")


def check_start(start: int, demo: Demo, frame_skip: int, name: str = "start") -> None:
    """Refuse a start that is no decision boundary inside the demo.

    Raises:
        UserError: it is not.
    """
    whole = isinstance(start, (int, np.integer))
    if not whole or start % frame_skip or not 0 <= start < len(demo):
        raise UserError(
            f"{name}: received {start!r}; it must be a multiple of {frame_skip} "
            f"from 0 to {len(demo) - 1}"
        )


class DemoResetEnv(gymnasium.Env[Image, np.int64]):
    """The game of a demo; `reset(options={"start": frame})` begins inside it.

    Observations: uint8 [stack * channels, height, width], newest image last. Rewards: the sum over
    the decision's frames of the reward's sign (or scaled: `Rules`). Actions: the game's own
    minimal set (`action_codes` holds their joystick codes), or all 18.

    Args:
        demo: A `Demo`, a file of one, or the name of a bundled one.
        rules: What an episode is; single fields can be given as keywords, too.
        view: What an observation is.
        states: The demo's start states, where the caller has them already.
        render_mode: "rgb_array" or None.
        **settings: Fields of `Rules`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(
        self,
        demo: Demo | Path | str,
        *,
        rules: Rules | None = None,
        view: View | None = None,
        states: StartStates | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        self.demo = demos.resolve(demo)
        self.rules = replace(rules or Rules(), **settings)
        self.view = view or View()
        self.states = states or start_states(self.demo, self.view, self.rules.frame_skip)
        self.render_mode = render_mode
        self.emulator = take(self.demo.game)
        self.action_codes = (
            ALL_ACTIONS if self.rules.full_action_space else self.emulator.minimal_actions
        )
        self.action_space = spaces.Discrete(len(self.action_codes))
        self.observation_space = spaces.Box(0, 255, self.view.shape, np.uint8)
        self._camera = Camera(self.emulator, self.view)
        self._judge = Judge(self.demo, self.rules)
        self._stack: Image = np.zeros(self.view.shape, np.uint8)
        rewards = np.abs(self.demo.rewards[self.demo.rewards != 0])
        self._reward_scale = 1 / float(rewards.mean()) if len(rewards) else 1.0
        self._log_extra = math.log(self.rules.extra_frames)
        self.end = End.FRAMES  # no episode yet
        self._screen: npt.NDArray[np.uint8] | None = None  # of a start, until the first step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Image, dict[str, Any]]:
        """Begin an episode at frame `options["start"]` (default 0, the game's own start).

        `options["limits"]` False: only the emulator and `max_frames` end the episode.

        Raises:
            UserError: the start is not a decision boundary inside the demo, or an option is none.
        """
        super().reset(seed=seed)
        options = options or {}
        check_options(options)
        self.begin(options.get("start", 0), bool(options.get("limits", True)))
        self._screen = self._restored_screen() if self.render_mode == "rgb_array" else None
        return self._stack.copy(), self._info()

    def reseed(self, seed: int) -> None:
        """Begin the random stream that the next episode draws from."""
        self.np_random = stream(seed)

    def begin(self, start: int, limits: bool = True) -> None:
        """`reset` without copies: for those who look at `observation`."""
        rules, skip = self.rules, self.rules.frame_skip
        check_start(start, self.demo, skip)
        self.start = self.frame = start
        self.limits = limits
        self.end = End.NONE
        self.succeeded = False
        self.score = self.highest = self._judge.scores[start]
        scores = self._judge.scores
        # A demo may lose again what it has gained: the final score is enough from anywhere.
        self._goal_score = min(scores[self._judge.goal(start, rules.horizon_frames)], scores[-1])
        random = self.np_random
        self._extra = int(math.exp(random.random() * self._log_extra))
        self._last_code = int(self.demo.actions[start - 1]) if start else NOOP
        self.emulator.restore(self.states.state(start // skip))
        self._camera.forget()
        self._stack[:] = self.states.observation(start // skip, self.view)
        if start == 0 and rules.no_ops:
            self._play_no_ops(int(random.integers(rules.no_ops + 1)))
        # As the demo has them: at power-on some games tell fewer than their first frame gives, and
        # after a restore some tell those of what was played before.
        lives = int(self.demo.lives[max(0, start - 1)])
        self._lives = self.emulator.lives() if lives == UNKNOWN_LIVES else lives
        self._lives_lost = 0  # as the judge counts: a life that is gained gives none back

    def _play_no_ops(self, count: int) -> None:
        for played in range(count):
            self.emulator.act(NOOP)
            self._camera.take()
            if (count - played - 1) % self.rules.frame_skip == 0:
                self._push_image()

    @property
    def observation(self) -> Image:
        """The current observation; the next step changes it in place."""
        return self._stack

    def step(self, action: SupportsIndex) -> tuple[Image, float, bool, bool, dict[str, Any]]:
        """Play one decision.

        Raises:
            UserError: there is no such action.
        """
        check_actions([action], len(self.action_codes))
        self._screen = None
        reward = self.play(index(action))
        truncated = self.end in TRUNCATED
        terminated = bool(self.end) and not truncated
        return self._stack.copy(), reward, terminated, truncated, self._info()

    def play(self, action: int) -> float:
        """`step` without copies: the reward; `end` and `observation` tell the rest."""
        if self.end:
            raise gymnasium.error.ResetNeeded("the episode has ended: call reset() first")
        rules, camera = self.rules, self._camera
        act = self.emulator.act
        code = self.action_codes[action]
        first_seen = rules.frame_skip - self.view.max_over_frames
        paid = 0.0
        for i in range(rules.frame_skip):
            if rules.sticky_probability and self.np_random.random() < rules.sticky_probability:
                raw = act(self._last_code)
            else:
                raw = act(code)
                self._last_code = code
            self.frame += 1
            if raw:
                self.score += raw
                paid += raw * self._reward_scale if rules.scaled_reward else math.copysign(1, raw)
            self.end = self._ended()
            if self.end and i < rules.frame_skip - 1:
                camera.fill()  # the decision's latest frames are not played any more
                break
            if i >= first_seen:
                camera.take()
        self._push_image()
        return paid

    def _ended(self) -> End:
        rules = self.rules
        self.highest = max(self.highest, self.score)
        if self.score >= self._goal_score:
            self.succeeded = True
        if self.emulator.game_over():
            return End.GAME_OVER
        if rules.max_frames is not None and self.frame - self.start >= rules.max_frames:
            return End.FRAMES
        if not self.limits:
            return End.NONE
        if rules.life_loss_ends:
            lives = self.emulator.lives()
            if lives < self._lives:
                self._lives_lost += self._lives - lives
                if self._lives_lost > self._judge.allowed_losses(self.start, self.frame):
                    return End.LIFE_LOST
            self._lives = lives
        if self.succeeded:
            if rules.horizon_frames is not None and self._goal_score < self._judge.scores[-1]:
                return End.HORIZON
            self._extra -= 1
            return End.NONE if self._extra >= 0 else End.SUCCESS
        if self._judge.behind(self.frame, self.score):
            return End.BEHIND
        return End.NONE

    def _push_image(self) -> None:
        channels = self.view.channels
        self._stack[:-channels] = self._stack[channels:]
        self._camera.image_into(self._stack[-channels:])

    def _info(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "frame": self.frame,
            "score": self.score,
            "success": self.succeeded,
            "end": self.end.name,
            "lives": self.emulator.lives(),
        }

    def render(self) -> npt.NDArray[np.uint8] | None:
        """The screen [height, width, 3], where `render_mode` is "rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return self.emulator.rgb() if self._screen is None else self._screen

    def _restored_screen(self) -> npt.NDArray[np.uint8]:
        """The screen after a restore: the emulator draws it with its next frame only."""
        state = self.emulator.clone()
        self.emulator.act(NOOP)
        screen = self.emulator.rgb()
        self.emulator.restore_clone(state)
        return screen
