"""The spec of a run: defaults for all but the demo, and the same names in a file and in Python."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from demoreset_api import errors
from demoreset_api.spec import ApiModel, DemoResetRun, RunSpec

ROOT = Path(__file__).parents[2]


def models(model: type[BaseModel] = DemoResetRun) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += models(kind)
    return found


def test_only_the_demo_must_be_said() -> None:
    spec = RunSpec.model_validate({"demo": {"name": "x"}})
    assert spec == RunSpec.model_validate(spec.model_dump(by_alias=True))


def test_every_field_is_described() -> None:
    for model in models():
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description[-1] in ".", f"{model.__name__}.{name}"


def test_unknown_fields_are_errors_everywhere_but_in_the_metadata() -> None:
    for model in models():
        expected = "ignore" if model.__name__ == "Metadata" else "forbid"
        assert model.model_config["extra"] == expected, model.__name__
        assert issubclass(model, ApiModel)


def test_a_spec_cannot_be_changed_after_it_was_checked() -> None:
    spec = RunSpec.model_validate({"demo": {"name": "x"}})
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"demo": {"name": "x", "path": "y"}},
        {"demo": {"name": "X"}},
        {"demo": {"name": "x", "sha256": "0"}},
        {"demo": {"name": "x"}, "goal": {"successRate": 0}},
        {"demo": {"name": "x"}, "goal": {"after": "Sleep"}},
        {"demo": {"name": "x"}, "curriculum": {"threshold": 1}},
        {"demo": {"name": "x"}, "ppo": {"gamma": float("inf")}},
        {"demo": {"name": "x"}, "environment": {"slots": 0}},
        {"demo": {"name": "x"}, "budget": {"frames": -1}},
    ],
)
def test_what_cannot_be_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RunSpec.model_validate(spec)


def test_an_amount_is_what_a_cluster_takes_too() -> None:
    def cpu(amount: object) -> str:
        wanted = {"demo": {"name": "x"}, "workers": {"resources": {"requests": {"cpu": amount}}}}
        return RunSpec.model_validate(wanted).workers.resources.requests["cpu"]

    assert [cpu(2), cpu("0.5"), cpu("500m")] == ["2", "0.5", "500m"]
    with pytest.raises(ValidationError, match=r"0\.5 must be in quotes"):
        cpu(0.5)
    for wrong in ("2 cores", "half", -1, "2\n"):
        with pytest.raises(ValidationError, match="it is an amount as Kubernetes writes it"):
            cpu(wrong)


NAMED = {"demo": {"name": "x"}}
RULES = [
    ({"demo": {}}, "demo: set exactly one of name"),
    ({"demo": {"name": "x", "path": "y"}}, "demo: set exactly one of name"),
    (
        NAMED | {"checkpoint": {"volume": {"claim": "mine", "storageClassName": "fast"}}},
        "checkpoint.volume: claim is an existing one, with its own storageClassName",
    ),
    (
        NAMED | {"checkpoint": {"volume": {"claim": "mine", "accessMode": "ReadWriteMany"}}},
        "checkpoint.volume: claim is an existing one, with its own storageClassName",
    ),
    (NAMED | {"workers": {"min": 3, "max": 2}}, "workers: max (2) must be at least min (3)"),
    (
        NAMED | {"environment": {"slots": 10}, "ppo": {"minibatches": 4}},
        "environment.slots (10) must be a multiple of ppo.minibatches (4)",
    ),
    (
        NAMED | {"environment": {"frameSkip": 2, "maxOverFrames": 3}},
        "environment: maxOverFrames (3) must not be more than frameSkip (2)",
    ),
    (
        NAMED | {"workers": {"collectives": "Nccl"}},
        "workers: collectives: Nccl needs gpus, at least 1",
    ),
    (
        NAMED
        | {"workers": {"max": 2}, "checkpoint": {"volume": {"accessMode": "ReadWriteOncePod"}}},
        "checkpoint.volume.accessMode: ReadWriteOncePod is for a single worker; several (2)",
    ),
]


@pytest.mark.parametrize(("spec", "says"), RULES)
def test_a_broken_rule_between_fields_names_them(spec: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RunSpec.model_validate(spec)
    (error,) = refused.value.errors()
    place = "".join(f"{part}." for part in error["loc"])[:-1]
    said = error["msg"].removeprefix("Value error, ")
    assert (f"{place}: {said}" if place else said).startswith(says)


def test_every_rule_between_fields_is_broken_once() -> None:
    rules = [rule for model in models() if issubclass(model, ApiModel) for rule in model.rules]
    everywhere = [rule for rule in rules if not rule.cluster]
    assert len({says for _, says in RULES}) == len(everywhere)


@pytest.mark.parametrize(
    ("spec", "entropy"),
    [
        ({}, 0.002),
        ({"curriculum": {"guide": 0}}, 0.02),
        ({"curriculum": {"mode": "Original"}}, 0.02),
        ({"curriculum": {"mode": "Original", "guide": 0.1}}, 0.002),
        ({"ppo": {"entropy": 0}}, 0),
        ({"ppo": {"entropy": 0.5}, "curriculum": {"guide": 0}}, 0.5),
    ],
)
def test_without_a_guide_the_policy_tries_more(spec: dict[str, object], entropy: float) -> None:
    assert RunSpec.model_validate({"demo": {"name": "x"}, **spec}).entropy == entropy


def test_each_error_has_an_exit_code_and_a_supervisor_can_tell_them_apart() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.DemoResetError)
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) == 5
    drawn = re.findall(r"── (\w+) \((\d+)\)", errors.__doc__ or "")
    assert {(kind.__name__, str(int(kind.exit_code))) for kind in kinds[1:]} == set(drawn)


def test_every_bundled_run_file_is_valid() -> None:
    yaml = pytest.importorskip("yaml")
    files = sorted((ROOT / "demos").glob("*.yaml"))
    assert files
    for file in files:
        run = DemoResetRun.model_validate(yaml.safe_load(file.read_text()))
        assert run.metadata.name == file.stem
        assert run.spec.budget.frames is not None
