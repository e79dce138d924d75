"""How well a policy plays: a grid of disturbances and ways to act, from the game's own start.

The protocol is the field's: Machado et al. 2018 (arXiv 1709.06009) for sticky actions and the cap
of 30 minutes, Agarwal et al. 2021 (arXiv 2108.13264) for the interquartile mean with an interval.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from demoreset_api.errors import UserError
from demoreset_api.spec import MAX_EPISODE_FRAMES
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.demo import Demo, record
from demoreset_trainer.env import Rules
from demoreset_trainer.episode import rules
from demoreset_trainer.play import Act, Played, play
from demoreset_trainer.policy_file import Trained
from demoreset_trainer.slots import Begin, Slots
from demoreset_trainer.states import start_states
from demoreset_trainer.streams import seed_from


class WatchEpisodes(Protocol):
    """Told how many episodes of how many a cell has played."""

    def __call__(self, cell: str, done: int, total: int) -> None:
        """A cell's name, episodes played, episodes in all."""


def silent(cell: str, done: int, total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Noise:
    """What disturbs the play."""

    sticky_probability: float = 0.0
    no_ops: int = 0
    epsilon: float = 0.0

    @property
    def none(self) -> bool:
        """Whether the game is deterministic."""
        return self == Noise()


NOISES = {
    "none": Noise(),
    "no-ops": Noise(no_ops=30),
    "sticky": Noise(sticky_probability=0.25),
    "sticky+no-ops": Noise(sticky_probability=0.25, no_ops=30),
    "epsilon": Noise(epsilon=0.01),
}
RESAMPLES = 2000  # of the bootstrap
SLOTS_PER_PROCESS = 16


@dataclass(frozen=True)
class Cell:
    """The result of one noise and one way to act, over `episodes` episodes."""

    noise: str
    act: str
    episodes: int
    mean: float
    median: float
    iqm: float  # mean of the middle half
    iqm_low: float  # 95 % interval, bootstrapped
    iqm_high: float
    max: int
    ties: float  # share that ties or beats the demo's score at any time: it may be lost again
    frames: float  # mean length


def summarise(noise: str, act: str, played: Sequence[Played], demo_score: int) -> Cell:
    """The statistics of a cell."""
    values = np.array([one.score for one in played], np.float64)
    low, high = interval(values)
    return Cell(
        noise=noise,
        act=act,
        episodes=len(values),
        mean=float(values.mean()),
        median=float(np.median(values)),
        iqm=iqm(values),
        iqm_low=low,
        iqm_high=high,
        max=int(values.max()),
        ties=float(np.mean([one.highest >= demo_score for one in played])),
        frames=float(np.mean([one.frames for one in played])),
    )


def iqm(values: npt.NDArray[np.float64]) -> float:
    """The mean of the middle half: a quarter is cut off (rounded down) at each end."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The bootstrapped 95 % interval of the interquartile mean."""
    random = np.random.default_rng(0)
    resamples = np.sort(random.choice(values, (RESAMPLES, len(values))), axis=1)
    cut = len(values) // 4
    means = resamples[:, cut : len(values) - cut].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def evaluate(
    trained: Trained,
    *,
    noises: Iterable[str] = tuple(NOISES),
    acts: Iterable[Act] = tuple(Act),
    episodes: int = 100,
    max_frames: int = MAX_EPISODE_FRAMES,
    seed: int = 0,
    processes: int,
    watch: WatchEpisodes = silent,
) -> Iterator[Cell]:
    """Play every cell of the grid from the game's own start; `watch` is told (cell, done, total).

    A game without noise and a policy that takes its likeliest action always play the same episode:
    it is played once.
    """
    demo = demo_or_blank(trained)
    base = Rules(
        frame_skip=int(trained.card["frameSkip"]),
        full_action_space=trained.spec.environment.full_action_space,
        max_frames=max_frames,
    )
    for name in noises:
        noise = NOISES[name]
        changed = replace(base, sticky_probability=noise.sticky_probability, no_ops=noise.no_ops)
        with Slots(
            demo,
            changed,
            trained.policy.shape.view,
            slots=min(episodes, SLOTS_PER_PROCESS * processes),
            processes=processes,
        ) as slots:
            for act in acts:
                count = 1 if noise.none and act is Act.ARGMAX else episodes
                random = np.random.default_rng([seed, count])
                begins = [Begin(0, seed_from(random), limits=False) for _ in range(count)]
                played = play(
                    slots,
                    trained.policy,
                    begins,
                    act=act,
                    epsilon=noise.epsilon,
                    seed=seed,
                    watch=partial(watch, f"{name} / {act}", total=count),
                )
                yield summarise(name, act, played, trained.demo_score)


def demo_or_blank(trained: Trained) -> Demo:
    """The policy's demo, or one that does nothing: enough to begin at the game's own start."""
    return trained.demo or record(trained.card["game"], np.zeros(1, np.uint8), frame_skip=1)


def profile(
    trained: Trained,
    *,
    every: int,
    episodes: int,
    seed: int = 0,
    processes: int,
    watch: WatchEpisodes = silent,
) -> dict[int, float]:
    """Success from every `every`-th decision of the demo, by the rules that it was trained by.

    Raises:
        UserError: the demo is not at hand.
    """
    if trained.demo is None:
        raise UserError(
            "--profile: this policy's demo is not at hand; evaluate the run's folder instead"
        )
    demo, policy = trained.demo, trained.policy
    played_by = rules(trained.spec)
    states = start_states(demo, policy.shape.view, played_by.frame_skip)
    burn_in = BurnIn(policy, states, trained.spec.ppo.burn_in)
    burn_in.refresh()
    last = len(demo) - 1
    starts = np.arange(0, last // played_by.frame_skip + 1, every)
    index = np.repeat(starts, episodes)
    random = np.random.default_rng(seed)
    begins = [Begin(int(start) * played_by.frame_skip, seed_from(random)) for start in index]
    with Slots(
        demo,
        played_by,
        policy.shape.view,
        slots=min(len(begins), SLOTS_PER_PROCESS * processes),
        processes=processes,
    ) as slots:
        played = play(
            slots,
            policy,
            begins,
            seed=seed,
            states=burn_in.at(index),
            watch=partial(watch, "profile", total=len(begins)),
        )
    success = np.array([episode.success for episode in played]).reshape(len(starts), episodes)
    rates = success.mean(axis=1).tolist()
    return dict(zip((starts * played_by.frame_skip).tolist(), rates, strict=True))


def as_json(
    trained: Trained,
    cells: Sequence[Cell],
    rates: dict[int, float] | None,
    *,
    seed: int,
    max_frames: int,
) -> dict[str, Any]:
    """All that was measured, and on what."""
    training = trained.card.get("training", {})
    return {
        "policy": trained.name,
        "checkpoint": training.get("checkpoint"),
        "update": training.get("updates"),
        "guide": trained.spec.curriculum.in_force.guide,
        "game": trained.card["game"],
        "demoScore": trained.demo_score,
        "seed": seed,
        "maxFrames": max_frames,  # of an episode
        "cells": [asdict(cell) for cell in cells],
        "profile": rates,
    }
