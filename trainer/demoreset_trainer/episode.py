"""What an episode of a run is: by which rules it is played, and where the latest may begin."""

import numpy as np

from demoreset_api.spec import MAX_EPISODE_FRAMES, Reward, RunSpec
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import Rules


def rules(spec: RunSpec) -> Rules:
    """What an episode of a run is."""
    curriculum, environment = spec.curriculum, spec.environment
    return Rules(
        frame_skip=environment.frame_skip,
        sticky_probability=environment.sticky_probability,
        no_ops=environment.no_ops,
        life_loss_ends=environment.life_loss_ends,
        lag_frames=curriculum.in_force.lag_frames,
        extra_frames=curriculum.in_force.extra_frames,
        horizon_frames=curriculum.horizon_frames,
        max_frames=MAX_EPISODE_FRAMES,
        full_action_space=environment.full_action_space,
        scaled_reward=environment.reward is Reward.SCALED,
    )


def last_start(demo: Demo, frame_skip: int) -> int:
    """The last start from which there still is something to earn, in frames."""
    short = np.flatnonzero(demo.scores[:-1] < demo.scores[-1])
    last = int(short[-1]) if len(short) else 0
    return last // frame_skip * frame_skip
