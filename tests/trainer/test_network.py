"""A real group over real hosts, one of which is cut off, far away, or wrong about the time."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from faults_network import COORDINATOR, PORT, WORKERS, apart, faketime, one_skewed, scattered
from hosts import NEEDED, Bad, Hosts
from injured import Event, check

os.environ.setdefault("RUST_LOG", "error")
pytest.importorskip("torchft.coordination", reason="needs demoreset[elastic]")

MISSING = [command for command in NEEDED if shutil.which(command) is None]
AWAY = 6.0  # seconds: longer than a sum may take
UPDATES = 5  # of a group that is slow
CONNECT = """
import socket, time
begun = time.monotonic()
socket.create_connection(("{host}", {port})).close()
print(time.monotonic() - begun)
"""

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
    # What others had found of its network meanwhile is no reason to sit out.
    assert outcasts(watched.events) == set()


def test_with_a_host_that_is_far_away_no_update_is_lost() -> None:
    far = Bad(seconds=0.02, lost=0.01)
    with scattered(bad={WORKERS[-1]: far}) as (watched, hosts):
        # It may count as dead, and be taken in again, as often as its packets are late.
        watched.wait(
            lambda: len(committed(watched.look(), WORKERS[-1])) >= UPDATES, "updates of the far one"
        )
        meet = CONNECT.format(host=hosts.addresses[COORDINATOR], port=PORT)
        asked = hosts.on(WORKERS[-1], sys.executable, "-c", meet)
        assert float(subprocess.check_output(asked)) >= far.seconds, "it is not far"
    found = check(watched.events)
    assert found["updates"] >= UPDATES
    assert (found["updatesLost"], found["forks"]) == (0, 0)


def test_who_is_too_far_away_sits_out_until_it_is_not() -> None:
    far = Bad(seconds=0.2, lost=0.05)
    with scattered(bad={WORKERS[-1]: far}, dead_ms=5000) as (watched, hosts):
        watched.wait(lambda: WORKERS[-1] in outcasts(watched.look()), "it sits out")
        done = len(committed(watched.look()))
        watched.wait(lambda: len(committed(watched.look())) > done + 50, "the others go on")
        assert "sits out until" in watched.said()
        hosts.mend(WORKERS[-1])
        watched.whole()
    found = check(watched.events)
    assert (found["updatesLost"], found["forks"]) == (0, 0)


def outcasts(events: list[Event]) -> set[str]:
    return {e["out"].partition("-")[0] for e in events if e["event"] == "outcast"}


def committed(events: list[Event], worker: str = "") -> list[Event]:
    return [e for e in events if e["event"] == "commit" and e["member"].startswith(worker)]


@pytest.mark.skipif(faketime() is None, reason="not installed: faketime")
@pytest.mark.skipif(shutil.which("cc") is None, reason="not installed: cc")
def test_a_clock_that_is_wrong_changes_nothing() -> None:
    # Two cores are busy: a pause is not the clock's doing.
    failures, events = one_skewed(30, seconds=10, dead_ms=5000)
    assert failures == []
    found = check(events)
    assert (found["updatesLost"], found["forks"]) == (0, 0)
