"""The spec of a DemoResetRun: one model for a file, a cluster and a test.

Positions in a demo are counted in frames. Every field has a default that works, but the demo.
What only a cluster needs is ignored on one machine.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from demoreset_api.names import API_VERSION, KIND, MANAGER

Share = Annotated[float, Field(ge=0, le=1)]


def _quantity(value: object) -> object:
    if isinstance(value, float):  # the schema of a custom resource has no word for it
        raise ValueError(f"{value} must be in quotes, or a number of thousandths, as 500m")
    return str(value) if isinstance(value, int) else value


@dataclass(frozen=True)
class Form:
    """How a text is written, an annotation of it: checked here, and in the API server.

    pattern: a regular expression that both know, without a quote or a backslash. right: what is
    right, for people.
    """

    pattern: str
    right: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check it after what it is a text by."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Tell it to who writes the schema of the resource."""
        return {**handler(core), "form": {"pattern": self.pattern, "right": self.right}}

    def _check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:  # of which $ is before no last newline
            raise ValueError(self.right)
        return value


MAX_NAME = 51  # with what is added, as `-coordinator`, the name of a Service: 63
NAME = Form(
    f"^[a-z]([-a-z0-9]{{0,{MAX_NAME - 2}}}[a-z0-9])?$",
    f"at most {MAX_NAME} of a-z, 0-9 and -, a letter first, no - last: a Service is named after it",
)
# A whole number in a YAML file is one, too.
Quantity = Annotated[
    str,
    Field(json_schema_extra={"quantity": True}),
    Form(
        "^[0-9]+([.][0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$",
        "it is an amount as Kubernetes writes it: 2, 500m (thousandths), 1.5Gi",
    ),
    BeforeValidator(_quantity),
]
MAX_EPISODE_FRAMES = 108_000  # 30 minutes of play, the field's usual limit
MAX_MEMBERS = 64  # of one worker
MAX_SECONDS = 2**31 - 1  # 68 years: as much as Kubernetes' own fields of this kind hold
CONTROLLER = "^[a-z0-9.-]+/[A-Za-z0-9._/-]+$"  # what manages an object, as Kubernetes names it
Opaque = dict[str, Any]  # an object of Kubernetes' own, checked by Kubernetes


@dataclass(frozen=True)
class Rule:
    """What must hold between the fields of a model: here, and as CEL in the API server.

    cel: over `self`. holds: the same in Python. message: with `{field}` for a value received.
    cluster: whether it is a rule on a cluster alone.
    """

    cel: str
    holds: Callable[[Any], bool]
    message: str
    cluster: bool = False


def _kinds(annotation: Any) -> set[Any]:
    """A field's type, or the types of which it may be one."""
    either = get_args(annotation)
    return {
        annotation,
        *(get_args(one)[0] if get_origin(one) is Annotated else one for one in either),
    }


class ApiModel(BaseModel):
    """snake_case in Python, camelCase on the wire; unknown fields are errors."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ()  # fields, as on the wire, that never change in a cluster

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1; the API server refuses it."""
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError("it is a number")
        return value

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        for rule in self.rules:
            if not rule.cluster and not rule.holds(self):
                values = {name: getattr(self, name) for name in type(self).model_fields}
                raise ValueError(rule.message.format(**values))
        return self


class DemoRef(ApiModel):
    """Which demonstration is learned, and how much of it."""

    name: (
        Annotated[
            str,
            Form(
                "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
                "it is one of `demoreset demo list`: of a-z, 0-9 and -, no - first or last",
            ),
        ]
        | None
    ) = Field(default=None, description="A bundled demonstration.")
    path: str | None = Field(
        default=None,
        min_length=1,
        description="A demonstration's file; relative to the run file, on a cluster to the "
        "volume's root, with or without a / before it.",
    )
    sha256: (
        Annotated[
            str,
            Form("^[0-9a-f]{64}$", "it is 64 of 0-9 and a-f, as `demoreset demo info` shows them"),
        ]
        | None
    ) = Field(
        default=None,
        description="The demo's SHA-256, as `demoreset demo info` shows it; another is refused.",
    )
    end_frame: int | None = Field(
        default=None, ge=1, description="Learn only the demo up to this frame."
    )

    rules = (
        Rule(
            "has(self.name) != has(self.path)",
            lambda demo: (demo.name is None) != (demo.path is None),
            "set exactly one of name (a bundled demo) and path (a file)",
        ),
        Rule(  # a run file on one machine may well lie beside its demo's folder
            "!has(self.path) || !self.path.matches('(^|/)[.][.](/|$)')",
            lambda demo: ".." not in (demo.path or "").split("/"),
            "on a cluster path begins at the root of the run's volume, and has no .. in it",
            cluster=True,
        ),
    )


class After(StrEnum):
    """What a run does when its goal is met."""

    STOP = "Stop"
    PLAY_ON = "PlayOn"


class Goal(ApiModel):
    """When the run is done."""

    success_rate: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of episodes from the game's own start that tie or beat the demo.",
    )
    episodes: int = Field(
        default=100, ge=1, description="Episodes over which the share is confirmed."
    )
    after: After = Field(
        default=After.STOP,
        description="Stop, or PlayOn: go on from the game's own start for score.",
    )


class CurriculumMode(StrEnum):
    """Which rule moves the start."""

    ADAPTIVE = "Adaptive"
    ORIGINAL = "Original"


@dataclass(frozen=True)
class ModeValues:
    """What each mode has its own default for; see the fields of `CurriculumSpec`."""

    guide: float
    window_frames: int
    window_share: float
    lag_frames: int
    extra_frames: int
    explore_frames: int


MODES = {
    CurriculumMode.ADAPTIVE: ModeValues(0.1, 48, 0.65, 240, 80, 0),
    CurriculumMode.ORIGINAL: ModeValues(0.0, 320, 0.8, 50, 1096, 100),
}


def _by_mode(name: str) -> str:
    """The defaults of a field, for its description."""
    return ", ".join(f"{mode} {getattr(values, name):g}" for mode, values in MODES.items())


class CurriculumSpec(ApiModel):
    """How starts are chosen and when they move. Unset fields take the mode's own default."""

    fixed = ("mode",)

    mode: CurriculumMode = Field(
        default=CurriculumMode.ADAPTIVE,
        description="Adaptive: a table of success with memory. Original: atari-reset's rule.",
    )
    threshold: float = Field(
        default=0.2, gt=0, lt=1, description="Success at which a start counts as mastered."
    )
    guide: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the cross entropy to the demo's actions around the frontier and "
        f"behind it, which fades with success. {_by_mode('guide')}; 0 is pure reinforcement "
        "learning.",
    )
    window_frames: int | None = Field(
        default=None,
        ge=4,
        description=f"Width of the window of starts at the frontier. {_by_mode('window_frames')}.",
    )
    window_share: Share | None = Field(
        default=None,
        description="Share of episodes that start in the window; the rest rehearses behind it. "
        f"{_by_mode('window_share')}.",
    )
    start_share: Share = Field(
        default=0.5,
        description="Adaptive: share of episodes from the game's own start once it is reached.",
    )
    memory: float = Field(
        default=0.93,
        gt=0,
        lt=1,
        description="Adaptive: what is left of a start's record at each new result.",
    )
    lag_frames: int | None = Field(
        default=None,
        ge=4,
        le=MAX_EPISODE_FRAMES,
        description="An episode ends when its score is this far behind the demo. "
        f"{_by_mode('lag_frames')}.",
    )
    extra_frames: int | None = Field(
        default=None,
        ge=1,
        description="Most frames played on after a success (log-uniform from 1). "
        f"{_by_mode('extra_frames')}.",
    )
    horizon_frames: int | None = Field(
        default=None,
        ge=4,
        description="Judge a start by the demo's score this many frames later and "
        "bootstrap there, instead of playing to the demo's end; from the game's own start all of "
        "it counts. For long demos.",
    )
    explore_frames: int | None = Field(
        default=None,
        ge=0,
        description=f"Frames after the start with halved logits. {_by_mode('explore_frames')}.",
    )

    @property
    def in_force(self) -> ModeValues:
        """What is set, and else what the mode has."""
        known = {field.name: getattr(self, field.name) for field in fields(ModeValues)}
        return replace(MODES[self.mode], **{k: v for k, v in known.items() if v is not None})


class PolicyPreset(StrEnum):
    """A network's size."""

    SMALL = "Small"
    BASE = "Base"
    ORIGINAL = "Original"


class PolicySpec(ApiModel):
    """The network."""

    preset: PolicyPreset = Field(
        default=PolicyPreset.SMALL,
        description="Small: 64x64, for CPUs. Base: 84x84 and a GRU. Original: atari-reset's size.",
    )
    recurrent: bool | None = Field(
        default=None, description="Whether it has a GRU. Small false, Base and Original true."
    )

    @property
    def memory(self) -> bool:
        """Whether it has a GRU, said or by its preset."""
        return self.preset is not PolicyPreset.SMALL if self.recurrent is None else self.recurrent


class PpoSpec(ApiModel):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347)."""

    learning_rate: float = Field(
        default=4e-4,
        gt=0,
        le=1,
        description="Adam's step size. Less near the goal: a quarter where all episodes succeed.",
    )
    adam_epsilon: float = Field(default=1e-5, gt=0, le=1, description="Adam's epsilon.")
    entropy: float | None = Field(
        default=None,
        ge=0,
        description="Coefficient of the entropy bonus. 0.002 with a guide, 0.02 without: where "
        "nothing shows the demo's action, the policy must keep trying others until it finds it. "
        "Without a guide it is less near the goal: a quarter where all episodes succeed.",
    )
    gamma: float = Field(default=0.999, gt=0, le=1, description="Discount per decision.")
    lambda_: float = Field(
        default=0.95, ge=0, le=1, alias="lambda", description="GAE's lambda (arXiv 1506.02438)."
    )
    clip: float = Field(default=0.15, gt=0, lt=1, description="Clip range of the policy's ratio.")
    value_clip: float = Field(
        default=0.1, ge=0, le=1e6, description="Clip range of the value; 0: none."
    )
    value_coefficient: float = Field(default=0.5, ge=0, description="Weight of the value's loss.")
    gradient_norm: float = Field(default=0.5, ge=0, description="Clip of its norm; 0: none.")
    l2: float = Field(default=0, ge=0, description="Weight of half the sum of squared weights.")
    epochs: int = Field(default=3, ge=1, le=100, description="Passes over each rollout.")
    minibatches: int = Field(
        default=4, ge=1, description="Parts of a rollout, cut by slot, with one step each."
    )
    rollout_length: int = Field(default=32, ge=2, le=4096, description="Decisions per slot.")
    burn_in: int = Field(
        default=16,
        ge=0,
        le=512,
        description="Decisions that give a recurrent policy its state, without a loss.",
    )


class Reward(StrEnum):
    """What the policy is paid."""

    SIGN = "Sign"
    SCALED = "Scaled"


class EnvironmentSpec(ApiModel):
    """The game as the policy meets it."""

    fixed = ("frameSkip", "fullActionSpace", "maxOverFrames", "slots")

    slots: int = Field(default=64, ge=1, le=65536, description="Environments of the whole run.")
    processes: int | None = Field(
        default=None,
        ge=1,
        description="Environment processes per member. Default: the cores it may use, or up to "
        "twice as many where one would have over 32 slots.",
    )
    frame_skip: int = Field(default=4, ge=1, le=16, description="Frames per decision.")
    sticky_probability: Share = Field(
        default=0, description="Chance per frame that the last action is repeated."
    )
    no_ops: int = Field(
        default=0, ge=0, le=1000, description="Most no-ops (uniform) before the game's own start."
    )
    life_loss_ends: bool = Field(
        default=True, description="An episode ends when it loses more lives than the demo."
    )
    full_action_space: bool = Field(
        default=False, description="All 18 actions instead of the game's own."
    )
    max_over_frames: int = Field(
        default=2, ge=1, le=4, description="An image is the maximum of so many frames (flicker)."
    )
    reward: Reward = Field(
        default=Reward.SIGN,
        description="Sign of each frame's reward, or Scaled: divided by the demo's mean absolute "
        "reward.",
    )

    rules = (
        Rule(  # else an episode's first image is of fewer frames than all others
            "!has(self.maxOverFrames) || self.maxOverFrames <= self.frameSkip",
            lambda environment: environment.max_over_frames <= environment.frame_skip,
            "maxOverFrames ({max_over_frames}) must not be more than frameSkip ({frame_skip}): "
            "a decision has no more frames",
        ),
    )


class Budget(ApiModel):
    """What the run may spend."""

    frames: int | None = Field(
        default=None,
        ge=1,
        description="Emulator frames of its rollouts; the run stops there. Default: no limit.",
    )


class AccessMode(StrEnum):
    """Who may mount a volume."""

    ONCE = "ReadWriteOnce"
    MANY = "ReadWriteMany"
    ONCE_POD = "ReadWriteOncePod"


class Retention(StrEnum):
    """What becomes of a volume when its run is deleted."""

    RETAIN = "Retain"
    DELETE = "Delete"


class Volume(ApiModel):
    """On a cluster: the volume that holds the run's folder, named after the run."""

    claim: (
        Annotated[
            str,
            Field(max_length=253),
            Form(
                "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
                "it is the name of a PersistentVolumeClaim: of a-z, 0-9, - and ., none of these "
                "two first or last",
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="An existing PersistentVolumeClaim. Default: one is made for the run.",
    )
    size: Quantity = Field(default="10Gi", description="Of the claim that is made.")
    storage_class_name: str | None = Field(
        default=None, description="Of the claim that is made. Default: the cluster's."
    )
    access_mode: AccessMode | None = Field(
        default=None,
        description="Of the claim that is made: ReadWriteMany for pods on several nodes. Default: "
        "ReadWriteMany where workers.max is above 1, else ReadWriteOnce.",
    )
    retention: Retention = Field(
        default=Retention.RETAIN,
        description="Whether the claim that was made outlives the run. One that was there before, "
        "as of an earlier run of this name, always does.",
    )

    @property
    def leaves(self) -> bool:
        """Whether it goes with its run."""
        return self.claim is None and self.retention is Retention.DELETE

    rules = (
        Rule(
            "!has(self.claim) || !has(self.storageClassName) && !has(self.accessMode)",
            lambda volume: (
                volume.claim is None
                or (volume.storage_class_name is None and volume.access_mode is None)
            ),
            "claim is an existing one, with its own storageClassName and accessMode: "
            "leave these out",
        ),
    )


class CheckpointSpec(ApiModel):
    """When the run is saved, and where."""

    fixed = ("volume",)

    interval_seconds: float = Field(
        default=30, gt=0, description="Least time between two checkpoints."
    )
    keep: int = Field(default=3, ge=3, le=100, description="Newest checkpoints kept; the best too.")
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="Besides, the first checkpoint of every so many updates is kept for ever.",
    )
    volume: Volume = Field(default=Volume(), description="On a cluster: where they are.")


class Stall(ApiModel):
    """What happens when the start no longer moves back: a ladder of remedies.

    Each rung multiplies the learning rate and the entropy's coefficient; progress goes back to the
    ground; after the last rung the run says that it is stalled, and goes on.
    """

    patience_frames: int = Field(
        default=2_000_000, ge=1, description="Frames without progress before the next rung."
    )
    rungs: int = Field(default=3, ge=0, le=20, description="Remedies to try; 0: none.")
    learning_rate_factor: float = Field(
        default=0.5, gt=0, le=1, description="What each rung multiplies the learning rate with."
    )
    entropy_factor: float = Field(
        default=0.5, gt=0, le=1, description="What each rung multiplies the entropy term with."
    )


class Collectives(StrEnum):
    """What adds up gradients over the members."""

    GLOO = "Gloo"
    NCCL = "Nccl"


class PullPolicy(StrEnum):
    """When an image is fetched."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class Resources(ApiModel):
    """What a worker's container asks for, and may use at most."""

    requests: dict[str, Quantity] = Field(
        default={}, description='What it is promised. Half a core is 500m, or "0.5" in quotes.'
    )
    limits: dict[str, Quantity] = Field(
        default={}, description="What it may use at most; written in the same way."
    )


class Workers(ApiModel):
    """The group: on a cluster so many pods, on one machine a single worker."""

    min: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Least members that train; fewer wait. On a cluster: least workers.",
    )
    max: int = Field(default=1, ge=1, le=1024, description="Workers that are wanted.")
    gpus: int = Field(default=0, ge=0, le=16, description="GPUs of a worker.")
    members_per_worker: int | None = Field(
        default=None,
        ge=1,
        le=MAX_MEMBERS,
        description="Processes that train in one worker. Default: one per GPU, else one.",
    )
    collectives: Collectives = Field(
        default=Collectives.GLOO,
        description="What adds up gradients: Gloo (CPU and GPU), or Nccl (one GPU per member).",
    )
    image: str | None = Field(
        default=None,
        min_length=1,
        description="Of the pods. Default: the trainer's that the operator was told.",
    )
    image_pull_policy: PullPolicy | None = Field(
        default=None,
        description="When it is fetched. Default: the cluster's rule; without an image of its own, "
        "what the operator was told.",
    )
    image_pull_secrets: list[str] = Field(
        default=[], max_length=16, description="Names of Secrets with which it is fetched."
    )
    resources: Resources = Field(
        default=Resources(),
        description="Of a worker's container; its GPUs are added. It uses as many cores as its CPU "
        "limit, else its request, rounded up; without GPUs it asks for half a core a member where "
        "neither is said.",
    )
    node_selector: dict[str, str] = Field(
        default={}, description="Labels that a worker's node must have."
    )
    tolerations: list[Opaque] = Field(
        default=[], max_length=64, description="Taints that a worker's pod tolerates."
    )
    affinity: Opaque | None = Field(
        default=None,
        description="A worker's affinity to nodes and other pods; the coordinator has of it what "
        "is about nodes.",
    )
    topology_spread_constraints: list[Opaque] = Field(
        default=[], max_length=16, description="How workers spread over the cluster."
    )
    priority_class_name: str | None = Field(default=None, description="Of the run's pods.")
    runtime_class_name: str | None = Field(
        default=None,
        description="Of the workers' pods, as nvidia where GPUs need a container runtime.",
    )
    scheduler_name: str | None = Field(
        default=None, description="Of the workers' pods. Default: the cluster's."
    )
    labels: dict[str, str] = Field(default={}, description="More labels of the workers' pods.")
    annotations: dict[str, str] = Field(default={}, description="Annotations of the workers' pods.")
    common_labels: dict[str, str] = Field(
        default={},
        description="More labels of all of the run's pods, the coordinator's and those that read "
        "its volume, too: what a cluster demands of every pod.",
    )
    common_annotations: dict[str, str] = Field(
        default={}, description="Annotations of all of the run's pods."
    )
    env: dict[str, str] = Field(
        default={},
        description="Environment variables of workers and the coordinator, as the limits of "
        "docs/timeouts.md; those that the operator sets win.",
    )
    grace_seconds: int = Field(
        default=60,
        ge=5,
        le=3600,
        description="From SIGTERM to SIGKILL of a pod: what leaving and saving may take.",
    )

    rules = (
        Rule(
            "!has(self.max) || self.max >= self.min",  # the API server tries it on {}
            lambda workers: workers.max >= workers.min,
            "max ({max}) must be at least min ({min})",
        ),
        Rule(
            "!has(self.collectives) || self.collectives != 'Nccl' || self.gpus > 0",
            lambda workers: workers.collectives is not Collectives.NCCL or workers.gpus > 0,
            "collectives: Nccl needs gpus, at least 1",
        ),
    )


class Restart(ApiModel):
    """On a cluster: what happens when a worker's pod fails.

    Lost nodes, evictions, preemptions and deleted pods never count, nor does what happens while
    other workers train on; what is the run's own fault does, each cause against its own limit.
    """

    limit: int = Field(
        default=10,
        ge=0,
        le=10_000,
        description="Crashes that a run survives; the next ends it.",
    )
    out_of_memory_limit: int = Field(
        default=5,
        ge=0,
        le=10_000,
        description="Times that its workers may need more memory than they are given.",
    )
    hang_limit: int = Field(
        default=10, ge=0, le=10_000, description="Hangs of workers that a run survives."
    )
    back_off_seconds: float = Field(
        default=1,
        ge=0,
        le=3600,
        description="Before the second restart in a row, whatever the cause; doubles from restart "
        "to restart.",
    )
    max_back_off_seconds: float = Field(
        default=300, ge=0, le=86_400, description="Longest wait before a restart."
    )


class RunSpec(ApiModel):
    """What is learned, how, and when it is done."""

    demo: DemoRef = Field(description="The demonstration.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Of every random stream of the run.")
    goal: Goal = Field(default=Goal(), description="When the run is done.")
    curriculum: CurriculumSpec = Field(default=CurriculumSpec(), description="Where it starts.")
    policy: PolicySpec = Field(default=PolicySpec(), description="The network.")
    ppo: PpoSpec = Field(default=PpoSpec(), description="The optimisation.")
    environment: EnvironmentSpec = Field(default=EnvironmentSpec(), description="The game.")
    budget: Budget = Field(default=Budget(), description="What it may spend.")
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="When it is saved.")
    stall: Stall = Field(default=Stall(), description="What to try when it no longer learns.")
    workers: Workers = Field(default=Workers(), description="The group.")
    restart: Restart = Field(default=Restart(), description="On a cluster: after failures.")
    suspend: bool = Field(
        default=False,
        description="On a cluster: save, and give all pods back; false: go on from there.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SECONDS,
        description="On a cluster: a run that ended is deleted after so long.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SECONDS,
        description="On a cluster: a run that is not over so long after it was applied or resumed "
        "has failed. What it waits counts, too, as for a quota or in Kueue's queue.",
    )
    pending_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SECONDS,
        description="On a cluster: a run that waits so long for its first worker has failed.",
    )
    managed_by: str | None = Field(
        default=None,
        max_length=63,
        description=f"On a cluster: who manages the run; another than {MANAGER} is left alone.",
    )

    fixed = ("demo", "seed", "policy", "managedBy")
    rules = (
        Rule(
            "self.environment.slots % self.ppo.minibatches == 0",
            lambda spec: spec.environment.slots % spec.ppo.minibatches == 0,
            "environment.slots ({environment.slots}) must be a multiple of "
            "ppo.minibatches ({ppo.minibatches})",
        ),
        Rule(
            "self.workers.max == 1 || !has(self.checkpoint.volume.accessMode) || "
            "self.checkpoint.volume.accessMode != 'ReadWriteOncePod'",
            lambda spec: (
                spec.workers.max == 1
                or spec.checkpoint.volume.access_mode is not AccessMode.ONCE_POD
            ),
            "checkpoint.volume.accessMode: ReadWriteOncePod is for a single worker; several "
            "({workers.max}) need ReadWriteMany, or ReadWriteOnce on one node",
        ),
        Rule(
            f"!has(self.managedBy) || self.managedBy.matches('{CONTROLLER}')",
            lambda spec: spec.managed_by is None or bool(re.fullmatch(CONTROLLER, spec.managed_by)),
            f"managedBy: a domain and a path after it, as {MANAGER} or kueue.x-k8s.io/multikueue",
            cluster=True,  # what was stored before there was a rule is somebody else's, too
        ),
    )

    @field_validator(
        *("ttl_seconds_after_finished", "active_deadline_seconds", "pending_deadline_seconds"),
        mode="before",
    )
    @classmethod
    def _at_most_the_longest(cls, value: Any) -> Any:
        """A longer one may have been stored before there was a limit: dates end with year 9999."""
        return min(value, MAX_SECONDS) if isinstance(value, int | float) else value

    @property
    def entropy(self) -> float:
        """The coefficient of the entropy bonus in force."""
        if self.ppo.entropy is not None:
            return self.ppo.entropy
        return 2e-3 if self.curriculum.in_force.guide else 2e-2


class Metadata(ApiModel):
    """A run's name and what Kubernetes keeps beside it."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, NAME] = Field(description="The run's name.")


class DemoResetRun(ApiModel):
    """One demonstration, one policy, one folder of checkpoints."""

    api_version: Literal[API_VERSION] = Field(description="Always the same.")  # type: ignore[valid-type]
    kind: Literal[KIND] = Field(description="Always the same.")  # type: ignore[valid-type]
    metadata: Metadata = Field(description="Its name.")
    spec: RunSpec = Field(description="What is wanted.")
