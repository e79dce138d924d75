"""What of a run is the same for all of its members, but the weights; with them, its checkpoint."""

import json
import zlib
from typing import Any

import numpy as np

from demoreset_api.errors import TryAgain
from demoreset_api.spec import CurriculumMode, RunSpec
from demoreset_trainer import run_folder
from demoreset_trainer.counters import Counters
from demoreset_trainer.curriculum import Curriculum, Result, make_curriculum
from demoreset_trainer.demo import Demo
from demoreset_trainer.episode import last_start
from demoreset_trainer.goal import GoalWatch
from demoreset_trainer.group import deal, step_of
from demoreset_trainer.stall import Ladder

# Of a spec, what all members must have alike; the rest is their supervisors' and the operator's.
LEARNED = ("seed", "goal", "curriculum", "policy", "ppo", "environment", "stall", "budget")


class RunState:
    """Where a run stands: counters, curriculum, goal, remedies, and who plays which episode.

    Every member has one, and does the same to it at every update; `digest` finds those that differ.

    Args:
        spec: What is wanted.
        demo: What is learned.
    """

    def __init__(self, spec: RunSpec, demo: Demo) -> None:
        self._spec, self._demo = spec, demo
        self.life = 0  # none yet: this member has no state of its own
        self.counters = Counters()
        self.goal = GoalWatch(spec.goal)
        self.ladder = Ladder(spec.stall)
        self.curriculum: Curriculum = make_curriculum(
            spec.curriculum,
            last_start=last_start(demo, spec.environment.frame_skip),
            frame_skip=spec.environment.frame_skip,
            slots=spec.environment.slots,
            rollout_length=spec.ppo.rollout_length,
        )
        self.episodes = np.zeros(spec.environment.slots, np.int64)  # number of each slot's current
        self.owners = [""] * spec.environment.slots  # the member that plays each slot
        self.playing_on = False  # beyond the goal, for score

    @property
    def step(self) -> int:
        """What orders it among the states of other members; 0: this one has none yet."""
        return step_of(self.life, self.counters.update) if self.life else 0

    def state(self) -> dict[str, Any]:
        """All of it but the life and the owners, as JSON."""
        return {
            "spec": self._spec.model_dump(mode="json", by_alias=True),
            "demo": {"game": self._demo.game, "sha256": self._demo.sha256},
            "counters": self.counters.state(),
            "curriculum": self.curriculum.state(),
            "goal": self.goal.state(),
            "stall": self.ladder.state(),
            "episodes": self.episodes.tolist(),
            "playing_on": self.playing_on,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of another member."""
        self.counters = Counters.load(state["counters"])
        self.curriculum.load(state["curriculum"])
        self.goal.load(state["goal"])
        self.ladder.load(state["stall"])
        self.episodes[:] = 0
        kept = min(len(state["episodes"]), len(self.episodes))
        self.episodes[:kept] = state["episodes"][:kept]
        self.playing_on = bool(state["playing_on"])

    def check_alike(self, state: dict[str, Any]) -> None:
        """Refuse a group whose members learn something else.

        Fields that only one of two versions knows are not compared.

        Raises:
            TryAgain: names what differs. Not a wrong run: it may be the others that must go.
        """
        found = run_folder.difference(_learned(state), _learned(self.state()), "spec")
        if found is not None:
            raise TryAgain(
                f"the other members of this group have {found}; give all of them one run file"
            )

    def go_on_in(self, life: int) -> bool:
        """Be in this life from here on, with all that was learned; whether it is a later one."""
        if life <= self.life:
            return False
        self.life = life
        self.counters.resumed(None)
        return True

    def resume(self, state: dict[str, Any], life: int) -> None:
        """Go on from the state of a checkpoint of this life: every slot begins anew."""
        self.load(state)
        counters = self.counters
        counters.resumed(life)
        if run_folder.other_goal(state, self._spec):
            if self.playing_on:  # its record is of a policy that has played for score since
                self.goal = GoalWatch(self._spec.goal)
                self.ladder.restart(counters.frames)
                self.playing_on = False
            else:
                self.goal.forget()
        if run_folder.other_rules(state, self._spec):
            # What the goal was met under says nothing now; the table of starts finds out by itself.
            self.goal = GoalWatch(self._spec.goal)
            self.ladder = Ladder(self._spec.stall, counters.frames)
            self.playing_on = False
        # The episodes that ran when it was saved are lost; their numbers are not used again.
        self.episodes += 2
        self.owners = [""] * len(self.owners)

    def digest(self, weights: int) -> int:
        """A checksum of all that must be the same for all members, on that of the weights."""
        common = [
            self.counters.update,
            self.counters.frames,
            self.curriculum.state(),
            self.goal.decisive(),
            self.ladder.state(),
            self.episodes.tolist(),
            self.owners,
            self.playing_on,
        ]
        return zlib.crc32(json.dumps(common).encode(), weights)

    def deal(self, members: list[str]) -> None:
        """Give every slot to one of the members; in one that changes hands an episode begins."""
        dealt = deal(self.owners, members)
        for slot, (before, now) in enumerate(zip(self.owners, dealt, strict=True)):
            if before and before != now:
                self.episodes[slot] += 1
        self.owners = dealt

    def record(self, results: list[Result], slots: int) -> None:
        """Count an update that is done.

        Args:
            results: Its episodes, in the order of their slots.
            slots: Those that were played; the others' members were lost.
        """
        counters = self.counters
        per_slot = self._spec.ppo.rollout_length * self._spec.environment.frame_skip
        counters.update += 1
        counters.frames += slots * per_slot
        counters.frames_discarded += (len(self.episodes) - slots) * per_slot
        counters.episodes += len(results)
        for result in results:
            self.episodes[result.slot] = result.episode + 1
            if result.start == 0:
                best = counters.score_max
                counters.score_max = result.score if best is None else max(result.score, best)

    @property
    def original(self) -> bool:
        """Whether the rules are those of atari-reset."""
        return self._spec.curriculum.mode is CurriculumMode.ORIGINAL


def _learned(state: dict[str, Any]) -> dict[str, Any]:
    """What a state's members learn, and from what."""
    return {"demo": state["demo"], **{topic: state["spec"][topic] for topic in LEARNED}}
