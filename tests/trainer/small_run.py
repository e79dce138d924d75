"""A run that is as small as can be, for tests of the loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from demoreset_api.spec import RunSpec
from demoreset_trainer import lives
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import DemoResetEnv
from demoreset_trainer.episode import rules
from demoreset_trainer.group import Alone, Group
from demoreset_trainer.loop import Loop
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.progress import Progress
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import start_states

SMALL = {
    "demo": {"name": "freeway-crossing"},
    "environment": {"slots": 8, "processes": 1},
    "ppo": {"rolloutLength": 8, "epochs": 2, "minibatches": 2},
}


class Diary:
    """A watch that remembers what it was told."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.notes: list[str] = []

    def phase(self, name: str) -> None:
        pass

    def update(self, progress: Progress) -> None:
        self.progress.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Shelf:
    """A saver that keeps copies in memory, of every update."""

    def __init__(self) -> None:
        self.overtaken = lives.NOBODY
        self.saved: list[Snapshot] = []
        self.candidates: list[bool] = []  # for each of them

    def due(self) -> bool:
        return True

    def save(self, snapshot: Snapshot, *, candidate: bool) -> None:
        self.saved.append(snapshot.copy())
        self.candidates.append(candidate)

    def finish(self, snapshot: Snapshot, *, candidate: bool) -> bool:
        self.save(snapshot, candidate=candidate)
        return True

    def take_life(self) -> int:
        return 2

    def facts(self) -> dict[str, Any]:
        return {}


def make(
    demo: Demo,
    *,
    group: Group | None = None,
    find: Callable[[], tuple[int, Snapshot | None]] = lambda: (1, None),
    **changes: dict[str, Any],
) -> tuple[Loop, Diary, Shelf]:
    torch.set_num_threads(1)
    spec = RunSpec.model_validate(
        SMALL | {k: SMALL.get(k, {}) | v for k, v in changes.items()}  # type: ignore[operator]
    )
    shape = architecture(spec.policy)
    states = start_states(demo, shape.view, 4)
    codes = DemoResetEnv(demo, rules=rules(spec), view=shape.view, states=states).action_codes
    torch.manual_seed(spec.seed)
    diary, shelf = Diary(), Shelf()
    loop = Loop(
        spec,
        demo,
        states,
        Policy(shape, len(codes)),
        lambda count: Slots(demo, rules(spec), shape.view, slots=count, processes=1),
        codes,
        group=group or Alone(),
        watch=diary,
        saver=shelf,
        find=find,
    )
    return loop, diary, shelf


def weights(loop: Loop) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in loop.ppo.policy.state_dict().values()])
