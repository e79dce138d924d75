"""What `helm test` says of an installation, by what the API server and the operator answer."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "charts/demoreset/files/installed.py"
RUNS, LEASE, OPERATOR = "/runs", "/lease", "http://operator:8080"

Json = dict[str, Any]


def held(renewed: str, holder: str = "operator-1") -> Json:
    return {"spec": {"holderIdentity": holder, "renewTime": renewed}}


def said(monkeypatch: pytest.MonkeyPatch, leases: list[Json], away: str = "") -> None:
    """Run the script where the Lease is so, look for look, and then as it was last; `away` is what
    does not answer. A second goes by between two looks.
    """
    now, left = [0.0], list(leases)

    def ask(url: str) -> bytes:
        if away and away in url:
            raise OSError("no route")
        if url.endswith(LEASE):
            return json.dumps(left.pop(0) if len(left) > 1 else left[0]).encode()
        return b""

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for name, value in (("RUNS", RUNS), ("LEASE", LEASE), ("OPERATOR", OPERATOR)):
        monkeypatch.setenv(name, value)
    script = runpy.run_path(str(SCRIPT))
    its = script["main"].__globals__
    its["ask"], its["time"] = ask, SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    script["main"]()


@pytest.mark.parametrize(
    "leases",
    [
        [held("10:00:00"), held("10:00:03")],
        [held("10:00:00")] * 20 + [held("10:00:20", "operator-2")],
        [
            {"spec": {"holderIdentity": ""}},
            {},
            held("10:00:00"),
            held("10:00:00"),
            held("10:00:03"),
        ],
    ],
    ids=["it is renewed", "another takes it", "it is taken"],
)
def test_an_operator_that_acts_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], leases: list[Json]
) -> None:
    said(monkeypatch, leases)
    assert capsys.readouterr().out.splitlines()[-1] == "it acts"


@pytest.mark.parametrize(
    ("leases", "away", "says"),
    [
        ([held("10:00:00")], RUNS, "not so: runs are served"),
        ([held("10:00:00")], OPERATOR, "not so: an operator answers"),
        ([held("10:00:00")], LEASE, "not so: an operator holds the Lease: no route"),
        ([held("10:00:00", "")], "", "nobody holds the Lease: no operator runs"),
        ([{}], "", "nobody holds the Lease"),
        (
            [held("10:00:00")],
            "",
            "operator-1 holds the Lease and has not renewed it since 10:00:00",
        ),
    ],
)
def test_where_nobody_acts_it_says_so(
    monkeypatch: pytest.MonkeyPatch, leases: list[Json], away: str, says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        said(monkeypatch, leases, away)
    assert says in str(ended.value.code)
