"""A real group over real hosts, one of which is cut off: the others go on, and it comes back."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from faults_network import COORDINATOR, apart, scattered
from hosts import NEEDED, Hosts
from injured import check

os.environ.setdefault("RUST_LOG", "error")
pytest.importorskip("torchft.coordination", reason="needs demoreset[elastic]")

MISSING = [command for command in NEEDED if shutil.which(command) is None]
AWAY = 6.0  # seconds: longer than a sum may take

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


def test_a_host_that_is_cut_off_waits_and_comes_back() -> None:
    cuts: list[Callable[[Hosts, str], None]] = [
        lambda hosts, host: hosts.cut(host),
        lambda hosts, host: hosts.cut(host, hears=False),
        lambda hosts, host: hosts.cut(host, to=COORDINATOR),
    ]
    with scattered() as (watched, hosts):
        partings = [apart(watched, hosts, cut, AWAY) for cut in cuts]
    assert [parting.failures for parting in partings] == [[]] * len(cuts)
    found = check(watched.events)
    assert (found["updatesLost"], found["forks"]) == (0, 0)
