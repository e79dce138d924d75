"""Putting a member together from what a run wants: networks, environments, the loop."""

from collections.abc import Callable

import torch

from demoreset_api.spec import RunSpec
from demoreset_trainer.checkpoint import Snapshot
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import DemoResetEnv
from demoreset_trainer.episode import rules
from demoreset_trainer.group import Group
from demoreset_trainer.loop import Loop, Saver
from demoreset_trainer.machine import cores, environment_processes
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.progress import Watch
from demoreset_trainer.slots import Slots
from demoreset_trainer.states import start_states


def assemble(
    spec: RunSpec,
    demo: Demo,
    *,
    group: Group,
    watch: Watch,
    saver: Saver,
    find: Callable[[], tuple[int, Snapshot | None]],
) -> Loop:
    """The loop of a member, on the GPU that it sees, else on its cores."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(cores())
    torch.manual_seed(spec.seed)
    shape = architecture(spec.policy, spec.environment.max_over_frames)
    states = start_states(demo, shape.view, spec.environment.frame_skip)
    codes = DemoResetEnv(demo, rules=rules(spec), view=shape.view, states=states).action_codes

    def make_slots(count: int) -> Slots:
        processes = environment_processes(count, cores(), spec.environment.processes)
        return Slots(demo, rules(spec), shape.view, slots=count, processes=processes)

    return Loop(
        spec,
        demo,
        states,
        Policy(shape, len(codes)).to(device),
        make_slots,
        codes,
        group=group,
        watch=watch,
        saver=saver,
        find=find,
    )
