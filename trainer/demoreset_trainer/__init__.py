"""Learning from one demonstration: demos, starts, environments, curriculum, PPO, and their CLI.

Importing this package is light (neither torch nor the emulator); it registers the gymnasium
environment `DemoReset-v0` where gymnasium is installed.
"""

from importlib.util import find_spec

if find_spec("gymnasium") is not None:
    from gymnasium.envs.registration import register

    register(
        "DemoReset-v0",
        entry_point="demoreset_trainer.env:DemoResetEnv",
        vector_entry_point="demoreset_trainer.vector:DemoResetVectorEnv",
    )
