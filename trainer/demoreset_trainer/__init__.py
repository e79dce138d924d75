"""Learning from one demonstration: demos, starts, environments, curriculum, PPO, and their CLI.

Importing this package is light (neither torch nor the emulator); it registers the gymnasium
environment `DemoReset-v0` as soon as gymnasium is imported, before or afterwards.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_REGISTRATION = "gymnasium.envs.registration"


def _register(registration: ModuleType) -> None:
    registration.register(
        "DemoReset-v0",
        entry_point="demoreset_trainer.env:DemoResetEnv",
        vector_entry_point="demoreset_trainer.vector:DemoResetVectorEnv",
    )


class _WhenImported:
    """Waits for gymnasium, which itself takes 150 ms and 25 MB that most commands do not need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _REGISTRATION:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _REGISTRATION in sys.modules:
    _register(sys.modules[_REGISTRATION])
else:
    sys.meta_path.insert(0, _WhenImported())
