"""Environment decisions per second, with observations, side by side with other people's.

Ours begins every episode at a random frame of a demonstration; the others at the game's own start.
All: 64 environments, 4 frames per decision, a stack of 4 grey images of 64 x 64, each the maximum
of 2 frames, random actions, no sticky ones, as many processes or threads as there are cores.
AsyncVectorEnv has a process for every environment.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from demoreset_trainer import demo as demos
from demoreset_trainer.machine import cores, settle
from measure import Turn, arguments, compare, machine, show, take_turns, write

COUNT = 64
SIZE = 64
STACK = 4
SKIP = 4
OURS = "demoreset Slots"
IDS = {"montezuma_revenge": "MontezumaRevenge", "freeway": "Freeway"}
PACKAGES = ("demoreset", "ale-py", "envpool", "gymnasium", "numpy", "opencv-python-headless")
FREEWAY_FRAMES = 1024
UP = 2  # the joystick's code


def demonstration(game: str, file: Path | None) -> demos.Demo:
    """A demo to begin in: for Freeway, going up all the time."""
    if game == "freeway":
        return demos.record(game, np.full(FREEWAY_FRAMES, UP, np.uint8), frame_skip=SKIP)
    return demos.resolve(file or "montezuma-first-key")


def ours(turn: Turn, file: bytes) -> None:
    from demoreset_trainer.emulator import Emulator
    from demoreset_trainer.env import Rules
    from demoreset_trainer.slots import Begin, Slots
    from demoreset_trainer.states import View
    from demoreset_trainer.streams import seed_from

    demo = demos.from_bytes(file, "demo")
    random = np.random.default_rng(0)
    codes = len(Emulator(demo.game).minimal_actions)
    view = View(SIZE, SIZE, stack=STACK)
    # As the curriculum does it: never where nothing is left to earn.
    last = int(np.flatnonzero(demo.scores < demo.scores[-1])[-1]) // SKIP

    def begin() -> Begin:
        return Begin(int(random.integers(last + 1)) * SKIP, seed_from(random))

    with Slots(demo, Rules(frame_skip=SKIP), view, slots=COUNT, processes=cores()) as slots:
        slots.reset([begin() for _ in range(COUNT)])
        for slot in range(COUNT):
            slots.plan(slot, begin())
        done = episodes = 0
        while turn(done, {"episodes": episodes}):
            slots.action[:] = random.integers(codes, size=COUNT)
            slots.send()
            slots.wait()
            slots.observation.copy()  # the others hand out copies, too
            ended = np.flatnonzero(slots.end)
            for slot in ended.tolist():
                slots.plan(slot, begin())
            done, episodes = COUNT, len(ended)


def atari_vector_env(turn: Turn, game: str) -> None:
    from ale_py.vector_env import AtariVectorEnv

    env = AtariVectorEnv(
        game,
        COUNT,
        num_threads=cores(),
        img_height=SIZE,
        img_width=SIZE,
        stack_num=STACK,
        frameskip=SKIP,
    )
    _play(turn, env)


def env_pool(turn: Turn, game: str) -> None:
    envpool: Any = importlib.import_module("envpool")
    env = envpool.make(
        f"{IDS[game]}-v5",
        env_type="gymnasium",
        num_envs=COUNT,
        num_threads=cores(),
        img_height=SIZE,
        img_width=SIZE,
        stack_num=STACK,
        frame_skip=SKIP,
    )
    _play(turn, env, int(env.action_space.n))


def async_vector_env(turn: Turn, game: str) -> None:
    from gymnasium.vector import AsyncVectorEnv

    env: Any = AsyncVectorEnv([lambda: one(game)] * COUNT)
    _play(turn, env)
    env.close()


def one(game: str) -> Any:
    """One environment as gymnasium documents it."""
    import ale_py
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    gymnasium.register_envs(ale_py)
    env: Any = gymnasium.make(f"ALE/{IDS[game]}-v5", frameskip=1, repeat_action_probability=0.0)
    env = AtariPreprocessing(env, frame_skip=SKIP, screen_size=SIZE)
    return FrameStackObservation(env, STACK)


def _play(turn: Turn, env: Any, actions: int | None = None) -> None:
    random = np.random.default_rng(0)
    actions = actions or int(env.single_action_space.n)
    env.reset()
    done = 0
    while turn(done):
        env.step(random.integers(actions, size=COUNT))
        done = COUNT


def main() -> None:
    settle()
    parser = arguments(__doc__, seconds=4)
    parser.add_argument("--demo", type=Path, help="of Montezuma; default: montezuma-first-key")
    options = parser.parse_args()
    result: dict[str, Any] = {"unit": "decisions", "machine": machine(PACKAGES), "games": {}}
    for game in IDS:
        print(f"\n{game}")
        demo = demonstration(game, options.demo)
        samples = take_turns(
            {
                OURS: (ours, (demo.to_bytes(),)),
                "ale_py AtariVectorEnv": (atari_vector_env, (game,)),
                "EnvPool": (env_pool, (game,)),
                "gymnasium AsyncVectorEnv": (async_vector_env, (game,)),
            },
            rounds=options.rounds,
            seconds=options.seconds,
            only=options.only,
        )
        rows = compare(samples, OURS)
        show(rows, "decisions")
        result["games"][game] = {"demoFrames": len(demo), "contestants": rows}
    write(result, options.out, "slots")


if __name__ == "__main__":
    main()
