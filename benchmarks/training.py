"""Frames per second of a whole training, side by side with other people's PPO.

All: the network of the preset `Small` (16@6/3, 32@3/2, 32@3/1, 256), 64 environments of 64 x 64
grey images, stack 4, 4 frames per decision, 32 decisions per update, 3 epochs of 4 minibatches.

- demoreset: `Loop`, as `demoreset run` puts it together; with resets, curriculum and guide. Where
  the CPU computes in bfloat16, it does; once more in float32, as the others do.
- Stable-Baselines3: its PPO over its SubprocVecEnv, with its own Atari wrappers.
- CleanRL's programs are files to be copied, not a package. `_single_file` is written anew after
  their structure (storage of tensors, a Python loop for GAE, shuffled flat minibatches): over
  gymnasium's SyncVectorEnv as `ppo_atari`, over EnvPool as `ppo_atari_envpool`, and the same loop
  over ale-py's AtariVectorEnv.
"""

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from demoreset_trainer import demo as demos
from demoreset_trainer.machine import cores, settle
from measure import Turn, arguments, compare, machine, show, take_turns, write

COUNT = 64
SIZE = 64
STACK = 4
SKIP = 4
LENGTH = 32
EPOCHS = 3
MINIBATCHES = 4
FRAMES = COUNT * LENGTH * SKIP  # of one update
RATE, GAMMA, LAMBDA, CLIP, ENTROPY = 4e-4, 0.999, 0.95, 0.15, 2e-3
OURS, IN_FLOAT32 = "demoreset", "demoreset, float32"
GAME, ID = "montezuma_revenge", "MontezumaRevenge"
PACKAGES = (
    "demoreset",
    "torch",
    "ale-py",
    "stable-baselines3",
    "envpool",
    "gymnasium",
    "numpy",
    "opencv-python-headless",
)


def ours(turn: Turn, file: bytes, float32: bool = False) -> None:
    settle()
    from demoreset_api.spec import RunSpec
    from demoreset_trainer import policy
    from demoreset_trainer.assemble import assemble
    from demoreset_trainer.group import Alone

    if float32:
        policy._CPU_HAS_BF16 = False
    demo = demos.from_bytes(file, "demo")
    spec = RunSpec.model_validate(
        {"demo": {"name": "unnamed"}, "goal": {"successRate": 1.0, "episodes": 1_000_000}}
    )
    latest: dict[str, float] = {}
    watch: Any = SimpleNamespace(
        phase=lambda name: None,
        note=lambda text: None,
        update=lambda progress: latest.update(progress.phase_seconds),
    )
    saver: Any = SimpleNamespace(due=lambda: False, facts=dict)
    loop = assemble(spec, demo, group=Alone(), watch=watch, saver=saver, find=lambda: (1, None))

    waited = 0.0  # for our turn, within the optimisation that is told of next

    def stopping() -> bool:  # asked between updates, and in the optimisation
        nonlocal waited
        phases = dict(latest)
        latest.clear()
        if not phases:
            return False
        phases["optimise"] -= waited
        begun = time.perf_counter()
        on = turn(FRAMES, phases)
        waited = time.perf_counter() - begun
        return not on

    loop.run(stopping)


def stable_baselines(turn: Turn) -> None:
    sb3: Any = importlib.import_module("stable_baselines3")
    make_atari_env = importlib.import_module("stable_baselines3.common.env_util").make_atari_env
    vec_env = importlib.import_module("stable_baselines3.common.vec_env")
    callback: Any = importlib.import_module("stable_baselines3.common.callbacks").BaseCallback
    layers = importlib.import_module("stable_baselines3.common.torch_layers")
    extractor: Any = layers.BaseFeaturesExtractor
    import ale_py
    import gymnasium
    import torch

    gymnasium.register_envs(ale_py)

    class Features(extractor):  # type: ignore[misc]
        def __init__(self, space: Any) -> None:
            super().__init__(space, 256)
            self.trunk = _trunk()

        def forward(self, observations: torch.Tensor) -> Any:
            return self.trunk(observations)

    class Clock(callback):  # type: ignore[misc]
        going_on = True
        updates = 0

        def _on_rollout_start(self) -> None:
            self.going_on = turn(FRAMES if self.updates else 0)
            self.updates += 1

        def _on_step(self) -> bool:
            return self.going_on

    env = make_atari_env(
        f"ALE/{ID}-v5",
        n_envs=COUNT,
        env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0},
        wrapper_kwargs={"screen_size": SIZE},
        vec_env_cls=vec_env.SubprocVecEnv,
    )
    model = sb3.PPO(
        "CnnPolicy",
        vec_env.VecFrameStack(env, STACK),
        learning_rate=RATE,
        n_steps=LENGTH,
        batch_size=COUNT * LENGTH // MINIBATCHES,
        n_epochs=EPOCHS,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        clip_range=CLIP,
        ent_coef=ENTROPY,
        policy_kwargs={"features_extractor_class": Features, "net_arch": []},
        device="cpu",
    )
    model.learn(10**12, callback=Clock())
    env.close()


def _trunk() -> Any:
    """The preset's convolutions and dense layer."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(STACK, 16, 6, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 256),
        nn.ReLU(),
    )


@dataclass(frozen=True)
class Envs:
    """A vector environment as `_single_file` wants it."""

    env: Any
    actions: int


def _sync() -> Envs:
    """As ppo_atari: all environments one after the other, in this process."""
    from gymnasium.vector import SyncVectorEnv

    env = SyncVectorEnv([_one] * COUNT)
    return Envs(env, int(env.single_action_space.n))  # type: ignore[attr-defined]


def _one() -> Any:
    import ale_py
    import gymnasium
    from gymnasium import wrappers

    gymnasium.register_envs(ale_py)
    env: Any = gymnasium.make(f"ALE/{ID}-v5", frameskip=1, repeat_action_probability=0.0)
    env = wrappers.RecordEpisodeStatistics(env)
    env = wrappers.AtariPreprocessing(
        env, frame_skip=SKIP, screen_size=SIZE, terminal_on_life_loss=True
    )
    env = wrappers.TransformReward(env, lambda reward: float(np.sign(float(reward))))
    return wrappers.FrameStackObservation(env, STACK)


def _envpool() -> Envs:
    """As ppo_atari_envpool."""
    envpool: Any = importlib.import_module("envpool")
    env = envpool.make(
        f"{ID}-v5",
        env_type="gymnasium",
        num_envs=COUNT,
        num_threads=cores(),
        img_height=SIZE,
        img_width=SIZE,
        stack_num=STACK,
        frame_skip=SKIP,
        episodic_life=True,
        reward_clip=True,
    )
    return Envs(env, int(env.action_space.n))


def _ale() -> Envs:
    from ale_py.vector_env import AtariVectorEnv

    env: Any = AtariVectorEnv(
        GAME,
        COUNT,
        num_threads=cores(),
        img_height=SIZE,
        img_width=SIZE,
        stack_num=STACK,
        frameskip=SKIP,
        episodic_life=True,
        reward_clipping=True,
    )
    return Envs(env, int(env.single_action_space.n))


def _single_file(turn: Turn, make: Any) -> None:
    """PPO as CleanRL structures it."""
    import torch
    from torch import nn

    categorical: Any = torch.distributions.Categorical
    envs = make()
    env, actions_of = envs.env, envs.actions
    trunk, actor, critic = _trunk(), nn.Linear(256, actions_of), nn.Linear(256, 1)
    parameters = [p for part in (trunk, actor, critic) for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE, eps=1e-5)

    def decide(seen: Any, action: Any = None) -> Any:
        features = trunk(seen / 255.0)
        distribution = categorical(logits=actor(features))
        if action is None:
            action = distribution.sample()
        return action, distribution.log_prob(action), distribution.entropy(), critic(features)

    observations = torch.zeros((LENGTH, COUNT, STACK, SIZE, SIZE))
    actions = torch.zeros((LENGTH, COUNT))
    log_probs, rewards, dones, values = (torch.zeros((LENGTH, COUNT)) for _ in range(4))
    seen = torch.tensor(np.asarray(env.reset()[0]), dtype=torch.float32)
    done = torch.zeros(COUNT)
    played = 0
    phases: dict[str, float] = {}
    while turn(played, phases):
        begun = time.monotonic()
        for step in range(LENGTH):
            observations[step], dones[step] = seen, done
            with torch.no_grad():
                action, log_prob, _, value = decide(seen)
            values[step], actions[step], log_probs[step] = value.flatten(), action, log_prob
            images, reward, terminated, truncated, _ = env.step(action.numpy())
            rewards[step] = torch.tensor(reward, dtype=torch.float32)
            seen = torch.tensor(np.asarray(images), dtype=torch.float32)
            done = torch.tensor(np.logical_or(terminated, truncated), dtype=torch.float32)
        rolled = time.monotonic()
        with torch.no_grad():
            next_value = critic(trunk(seen / 255.0)).flatten()
            advantages = torch.zeros_like(rewards)
            later = torch.zeros(COUNT)
            for t in reversed(range(LENGTH)):
                alive = 1.0 - (done if t == LENGTH - 1 else dones[t + 1])
                following = next_value if t == LENGTH - 1 else values[t + 1]
                delta = rewards[t] + GAMMA * following * alive - values[t]
                advantages[t] = later = delta + GAMMA * LAMBDA * alive * later
        targets = (advantages + values).flatten()
        flat = observations.flatten(0, 1)
        old_actions, old_log_probs = actions.flatten(), log_probs.flatten()
        old_values, flat_advantages = values.flatten(), advantages.flatten()
        order = np.arange(COUNT * LENGTH)
        for _ in range(EPOCHS):
            np.random.shuffle(order)
            for part in np.split(order, MINIBATCHES):
                _, new_log_prob, entropy, new_value = decide(flat[part], old_actions[part].long())
                change = new_log_prob - old_log_probs[part]
                ratio = change.exp()
                with torch.no_grad():
                    ((ratio - 1) - change).mean()
                    ((ratio - 1.0).abs() > CLIP).float().mean().item()
                chosen = flat_advantages[part]
                chosen = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
                policy = torch.max(
                    -chosen * ratio, -chosen * ratio.clamp(1 - CLIP, 1 + CLIP)
                ).mean()
                new_value = new_value.flatten()
                clipped = old_values[part] + (new_value - old_values[part]).clamp(-CLIP, CLIP)
                errors = torch.max((new_value - targets[part]) ** 2, (clipped - targets[part]) ** 2)
                loss = policy - ENTROPY * entropy.mean() + 0.5 * 0.5 * errors.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        played = FRAMES
        phases = {"rollout": rolled - begun, "optimise": time.monotonic() - rolled}


def main() -> None:
    parser = arguments(__doc__, seconds=15)
    parser.add_argument("--demo", type=Path, help="what ours learns; default: montezuma-first-key")
    parser.add_argument(
        "--settle-all",
        action="store_true",
        help="give the others our setting of GOMP_SPINCOUNT, too",
    )
    options = parser.parse_args()
    if options.settle_all:
        settle()
    demo = demos.resolve(options.demo or "montezuma-first-key")
    facts = machine(PACKAGES)
    samples = take_turns(
        {
            OURS: (ours, (demo.to_bytes(),)),
            IN_FLOAT32: (ours, (demo.to_bytes(), True)),
            "Stable-Baselines3 PPO": (stable_baselines, ()),
            "ppo_atari": (_single_file, (_sync,)),
            "ppo_atari over EnvPool": (_single_file, (_envpool,)),
            "ppo_atari over AtariVectorEnv": (_single_file, (_ale,)),
        },
        rounds=options.rounds,
        seconds=options.seconds,
        only=options.only,
    )
    rows = compare(samples, OURS)
    show(rows, "frames")
    for mine in (OURS, IN_FLOAT32):
        others = {k: v for k, v in samples.items() if k == mine or k not in (OURS, IN_FLOAT32)}
        if mine in samples and len(others) > 1:
            least = min(row["oursIsTimes"] for row in compare(others, mine) if row["name"] != mine)
            print(f"{mine} is {least:.2f} times the best of the others")
    write(
        {
            "unit": "frames",
            "machine": facts,
            "settleAll": options.settle_all,
            "demoFrames": len(demo),
            "contestants": rows,
        },
        options.out,
        "training",
    )


if __name__ == "__main__":
    main()
