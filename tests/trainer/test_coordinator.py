"""The coordinator as a real process: in a bare image, under garbage, on a taken port."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demoreset_api.errors import TryAgain, UserError
from demoreset_trainer import coordinator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchft is for Linux")

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path("purelib"))
LISTENS = "coordinator on port "

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the coordinator's image holds: ourselves and torchft; no torch, nor anything else."""
    folder = tmp_path_factory.mktemp("image")
    wanted = [
        ROOT / "operator" / "demoreset_api",
        ROOT / "trainer" / "demoreset_trainer",
        SITE / "torchft",
        *SITE.glob("demoreset-*.dist-info"),
    ]
    for path in wanted:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def start(image: Path) -> Iterator[Start]:
    started = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "demoreset_trainer.cli", "coordinator", *arguments],
            env=os.environ | {"PYTHONPATH": str(image)},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def port_of(process: "subprocess.Popen[str]") -> int:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert LISTENS in line, line
    return int(line.partition(LISTENS)[2].partition(":")[0])


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024 / 1e6


def answers(port: int) -> bool:
    """Whether the coordinator speaks HTTP still: the page of its state."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return client.recv(12) == b"HTTP/1.1 200"


def test_it_is_small_and_listens_without_torch(start: Start) -> None:
    process = start("--port", "0")
    port = port_of(process)
    assert answers(port)
    assert resident_mb(process.pid) < 30


def test_garbage_on_its_port_does_not_end_it(start: Start) -> None:
    process = start("--port", "0")
    port = port_of(process)
    for size in (0, 1, 24, 1000, 100_000):
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                try:
                    client.sendall(os.urandom(size))
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it has hung up already
    assert process.poll() is None
    assert answers(port)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_the_code_that_says_so(
    start: Start, number: signal.Signals, code: int
) -> None:
    process = start("--port", "0")
    port_of(process)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == code
    assert said == ""


def test_it_ends_with_its_parent_where_it_was_told_so(image: Path) -> None:
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import os, subprocess, sys; "
            "sys.exit(subprocess.call([*sys.argv[1:], '--parent', str(os.getpid())]))",
            *(sys.executable, "-S", "-m", "demoreset_trainer.cli"),
            *("coordinator", "--port", "0"),
        ],
        env=os.environ | {"PYTHONPATH": str(image)},
        stderr=subprocess.PIPE,
        text=True,
    )
    port_of(parent)
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)  # as `timeout` does it to all of a group of processes
    time.sleep(0.5)
    assert parent.poll() is None
    parent.kill()
    _, said = parent.communicate(timeout=10)  # returns when the coordinator, too, has hung up
    assert said == ""


def test_a_taken_port_is_tried_again_and_then_named() -> None:
    waited: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TryAgain, match=f"port {port} is taken"):
            coordinator.serve(
                "127.0.0.1",
                port,
                least=1,
                dead_ms=700,
                waits=coordinator.back_off(),
                sleep=waited.append,
            )
    assert sum(waited) == pytest.approx(coordinator.PORT_TAKEN)
    assert waited[0] < 0.2


def test_a_port_that_becomes_free_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = coordinator.serve(
            "127.0.0.1",
            port,
            least=1,
            dead_ms=700,
            waits=iter([0.5]),
            sleep=lambda _: taken.close(),
        )
    assert coordinator.port_of(server) == port
    assert answers(port)


def test_an_address_that_is_not_here_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 --port 0: cannot listen"):
        coordinator.serve("192.0.2.1", 0, least=1, dead_ms=700, waits=iter([]))


@pytest.mark.parametrize(
    ("host", "ipv6", "bind"),
    [
        ("::", True, "[::]:29510"),
        ("::", False, "0.0.0.0:29510"),
        ("", True, "[::]:29510"),
        ("", False, "0.0.0.0:29510"),
        ("::1", True, "[::1]:29510"),
        ("127.0.0.1", True, "127.0.0.1:29510"),
        ("127.0.0.1", False, "127.0.0.1:29510"),
        ("coordinator", True, "coordinator:29510"),
    ],
)
def test_address(host: str, ipv6: bool, bind: str) -> None:
    assert coordinator.address(host, 29510, ipv6) == bind


def test_without_torchft_it_says_what_to_install(image: Path, tmp_path: Path) -> None:
    for path in image.iterdir():
        if path.name != "torchft":
            (tmp_path / path.name).symlink_to(path.resolve())
    done = subprocess.run(
        [sys.executable, "-S", "-m", "demoreset_trainer.cli", "coordinator", "--port", "0"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert "install demoreset[elastic]" in done.stderr
    assert done.stderr.count("\n") == 1
