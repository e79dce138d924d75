"""A film of one episode of a policy, with what a person wants to know drawn in."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from demoreset_api.errors import UserError
from demoreset_trainer.burn_in import BurnIn
from demoreset_trainer.env import DemoResetEnv, Rules, check_start
from demoreset_trainer.evaluate import demo_or_blank
from demoreset_trainer.play import Act, choose
from demoreset_trainer.policy_file import Trained
from demoreset_trainer.runfile import guided
from demoreset_trainer.video import VideoWriter, caption

AFTERMATH = 120  # frames that the film goes on after the demo was tied
FRAMES_PER_SECOND = 60


@dataclass(frozen=True)
class Filmed:
    """What the film shows."""

    score: int  # at its end
    frames: int
    tied: bool  # the demo, at any moment: in some games points are lost again


@torch.no_grad()
def film(
    trained: Trained,
    out: Path,
    *,
    start: int = 0,
    max_frames: int = 3600,
    act: Act = Act.SAMPLED,
    sticky_probability: float = 0.0,
    seed: int = 0,
) -> Filmed:
    """Play one episode from a frame of the demo into `out` (mp4 or GIF).

    It ends with the game, after `max_frames`, or a little after the demo was tied.

    Raises:
        UserError: the start is not in the demo, or the demo is not at hand.
    """
    if start and trained.demo is None:
        raise UserError("--from: this policy's demo is not at hand; give the run's folder instead")
    policy, skip = trained.policy, int(trained.card["frameSkip"])
    if trained.demo is not None:
        check_start(start, trained.demo, skip, name="--from")
    rules = Rules(
        frame_skip=skip,
        sticky_probability=sticky_probability,
        max_frames=max_frames,
        full_action_space=trained.spec.environment.full_action_space,
    )
    env = DemoResetEnv(demo_or_blank(trained), rules=rules, view=policy.shape.view)
    env.reseed(seed)
    env.begin(start, limits=False)
    burn_in = BurnIn(policy, env.states, trained.spec.ppo.burn_in if start else 0)
    burn_in.refresh()
    state = burn_in.at(np.array([start // skip]))
    random = np.random.default_rng(seed)
    tied_at: int | None = None
    with VideoWriter(out, fps=FRAMES_PER_SECOND / skip) as video:
        while not env.end and (tied_at is None or env.frame < tied_at + AFTERMATH):
            images = torch.from_numpy(env.observation[None])
            logits, _, state = policy.step(images, state)
            env.play(int(choose(logits, random.random((1, 2)), act, 0.0)[0]))
            if tied_at is None and env.score >= trained.demo_score:
                tied_at = env.frame
            video.add(caption(env.emulator.rgb(), _lines(trained, env, start, tied_at)))
    return Filmed(score=env.score, frames=env.frame - start, tied=tied_at is not None)


def _lines(trained: Trained, env: DemoResetEnv, start: int, tied_at: int | None) -> list[str]:
    demo = trained.demo
    lines = [f"score {env.score:,}   frame {env.frame:,}"]
    if demo is not None:
        there = int(demo.scores[min(env.frame, len(demo))])
        lines.append(f"demo  {there:,}   of {trained.demo_score:,} at frame {len(demo):,}")
    begun = "the game's own start" if start == 0 else f"frame {start:,} of the demo"
    lines.append("tied the demo" if tied_at else f"from {begun}, without the demo")
    lines.append(f"learned with {guided(trained.spec)}")
    return lines
