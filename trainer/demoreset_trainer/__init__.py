"""Learning from one demonstration: demos, starts, environments, curriculum, PPO, and their CLI.

Importing this package is light (neither torch nor the emulator); it registers the gymnasium
environment `DemoReset-v0` where gymnasium is installed.
"""

