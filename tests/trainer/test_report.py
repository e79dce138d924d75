"""What a run tells: the port, the screen, the graph."""

import io
import json
import math
import os
import pty
import re
import resource
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from demoreset_api.errors import UserError
from demoreset_api.names import API_VERSION, ASIDE, KIND, STARTING
from demoreset_trainer import cli, metrics, plot, report, run_folder
from demoreset_trainer.env import End
from demoreset_trainer.metrics import MetricsFile
from demoreset_trainer.progress import Progress
from demoreset_trainer.report import Report, standing
from demoreset_trainer.screen import LiveScreen, Picture, duration, make_screen, plain_line, tell
from small_progress import DISTINCT, PROGRESS

# Of each metric and each word of /status, the field of Progress that it tells.
METRICS = """
    curriculum_start_frame=start_frame curriculum_demo_frames=demo_frames
    curriculum_progress_ratio=progress_ratio curriculum_success_ratio=success_rate
    goal_success_ratio=goal_rate goal_ratio=goal score_mean=score_mean score_max=score_max
    episode_score_mean=episode_score_mean episode_score_max=episode_score_max
    update=update update_seconds=update_seconds learning_rate=learning_rate
    entropy_coefficient=entropy_coefficient
    entropy_nats=entropy kl_nats=kl clip_ratio=clip_share policy_loss=policy_loss
    value_loss=value_loss guide_loss=guide_loss explained_variance_ratio=explained_variance
    gradient_norm=gradient_norm frames_per_second=frames_per_second stall_rung=stall_rung
    stalled=stalled members=members generation=generation goodput_ratio=goodput
    eta_seconds=eta_seconds checkpoint_update=checkpoint_update
    checkpoint_age_seconds=checkpoint_age_seconds checkpoint_bytes=checkpoint_bytes
    checkpoint_write_seconds=checkpoint_seconds frames_total=frames training_seconds_total=seconds
    rejected_updates_total=rejected_updates updates_rolled_back_total=rolled_back
    frames_discarded_total=frames_discarded
"""
STANDING = """
    generation=generation worldSize=members rank=rank life=life resumed.life=resumed_life
    resumed.update=resumed_update
    resumed.frames=resumed_frames update=update frames=frames seconds=seconds
    curriculum.startFrame=start_frame curriculum.demoFrames=demo_frames
    curriculum.progress=progress_ratio curriculum.successRate=success_rate
    curriculum.goalRate=goal_rate evaluation.update=evaluation_update
    evaluation.episodes=evaluation_episodes evaluation.successRate=evaluation_rate
    training.framesPerSecond=frames_per_second training.scoreMean=score_mean
    training.scoreMax=score_max training.entropy=entropy training.learningRate=learning_rate
    training.stallRung=stall_rung training.stalled=stalled training.etaSeconds=eta_seconds
    checkpoint.update=checkpoint_update checkpoint.ageSeconds=checkpoint_age_seconds
    checkpoint.bytes=checkpoint_bytes checkpoint.writeSeconds=checkpoint_seconds
    checkpoint.error=checkpoint_error
"""


@pytest.fixture
def served() -> Iterator[Report]:
    served = Report(0, "127.0.0.1")
    yield served
    served.close()


def get(served: Report, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}{path}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(served: Report) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(get(served, "/metrics")[1]):
        for sample in family.samples:
            labels = "".join(f"{{{value}}}" for value in sample.labels.values())
            found[sample.name + labels] = sample.value
    return found


def test_metrics_say_where_the_run_is(served: Report) -> None:
    served.update(PROGRESS)
    told = samples(served)
    assert told["demoreset_curriculum_start_frame"] == 89
    assert told["demoreset_curriculum_progress_ratio"] == 0.75
    assert told["demoreset_frames_total"] == 57_344
    assert told["demoreset_episodes_total{success}"] == 2
    assert told["demoreset_checkpoint_failing"] == 0
    assert math.isnan(told["demoreset_goal_success_ratio"])


def values(table: str, progress: Progress) -> dict[str, Any]:
    pairs = (pair.split("=") for pair in table.split())
    return {name: getattr(progress, field) for name, field in pairs}


def test_every_metric_tells_a_field_of_its_own(
    served: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)  # or the checkpoint would grow older
    served.update(replace(DISTINCT, recoveries={"left": 3}, recovery_seconds={"left": 4.5}))
    told = {name.removeprefix("demoreset_"): value for name, value in samples(served).items()}
    assert told["recoveries_total{left}"] == 3
    assert told["recovery_seconds_total{left}"] == 4.5
    assert told.pop("checkpoint_failing") == 1
    del told["heartbeat_timestamp_seconds"]
    of_one_field = {name: value for name, value in told.items() if "{" not in name}
    assert of_one_field == values(METRICS, DISTINCT)


def test_every_word_of_where_a_run_stands_tells_a_field_of_its_own() -> None:
    told: dict[str, Any] = {}
    for name, value in standing(DISTINCT).items():
        parts = value if isinstance(value, dict) else {"": value}
        told |= {f"{name}.{part}".rstrip("."): content for part, content in parts.items()}
    assert told == values(STANDING, DISTINCT)


def test_before_the_first_update_nothing_is_said_that_is_not_known(served: Report) -> None:
    # A start of 0 would say that a run has arrived which only goes on from its checkpoint.
    assert list(samples(served)) == ["demoreset_heartbeat_timestamp_seconds"]


def test_a_checkpoint_grows_older_while_the_loop_hangs(
    served: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.update(replace(PROGRESS, checkpoint_age_seconds=5.0))
    told = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: told + 1000)
    assert samples(served)["demoreset_checkpoint_age_seconds"] == pytest.approx(1005, abs=5)
    checkpoint = json.loads(get(served, "/status")[1])["checkpoint"]
    assert checkpoint["ageSeconds"] == pytest.approx(1005, abs=5)


def test_a_client_that_goes_away_does_not_write_over_the_screen(
    served: Report, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            reset = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.send(b"GET /met")  # torn off in the middle of the request
    assert get(served, "/healthz")[0] == 200
    for thread in threading.enumerate():
        if "process_request" in thread.name:
            thread.join()
    assert capfd.readouterr().err == ""


def test_counters_follow_the_runs_totals_and_add_up_what_has_none(served: Report) -> None:
    served.update(PROGRESS)
    served.update(replace(PROGRESS, update=8, frames=60_000, checkpoint_error="full"))
    told = samples(served)
    assert told["demoreset_frames_total"] == 60_000
    assert told["demoreset_episodes_total{success}"] == 4
    assert told["demoreset_phase_seconds_total{rollout}"] == 1.0
    assert told["demoreset_checkpoint_failing"] == 1


def test_every_metric_is_documented_and_every_documented_one_exists(served: Report) -> None:
    served.update(PROGRESS)
    families = text_string_to_metric_families(get(served, "/metrics")[1])
    told = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.endswith("_created")
    }
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(demoreset_\w+)[{`]", page, re.MULTILINE)
    assert sorted(rows) == sorted(told)
    outcomes = re.search(r"^\| `demoreset_episodes_total.*$", page, re.MULTILINE)
    assert outcomes is not None
    assert all(f"`{end.name.lower()}`" in outcomes[0] for end in End if end is not End.NONE)


def test_status_is_json_from_the_first_moment(served: Report) -> None:
    assert json.loads(get(served, "/status")[1])["phase"] == "starting"
    served.phase("rollout")
    served.update(PROGRESS)
    status = json.loads(get(served, "/status")[1])
    assert status["phase"] == "rollout"
    assert status["update"] == 7
    assert status["curriculum"]["startFrame"] == 89
    assert status["worldSize"] == 1


def test_of_members_that_are_not_heard_nothing_is_said(
    served: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> dict[str, str]:
        members = json.loads(get(served, "/status")[1])["members"]
        return {member["id"]: member["state"] for member in members}

    roster = [{"id": id, "pid": 1, "host": "h", "update": 7} for id in ("ours", "theirs")]
    served.update(replace(PROGRESS, roster=roster))
    served.states({"ours": "training", "hung": "training", "new": "starting"})
    served.phase("quorum")
    assert told() == {"ours": "training", "theirs": "training", "hung": "out", "new": "starting"}
    monkeypatch.setattr(report, "WAITS_AFTER", -1.0)
    served.phase("quorum")
    assert told()["ours"] == "waiting"
    assert told()["theirs"] == "unknown"
    served.phase("rollout")
    assert told()["theirs"] == "training"


def test_health_is_lost_when_the_loop_is_silent(
    served: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(served, "/healthz") == (200, "starting\n")
    served.phase("rollout")
    assert get(served, "/healthz") == (200, "ok\n")
    monkeypatch.setattr(report, "HUNG_AFTER", -1.0)
    code, text = get(served, "/healthz")
    assert code == 503
    assert "no sign of life" in text
    assert get(served, "/readyz")[0] == 503
    assert get(served, "/")[0] == 404


def test_who_trains_is_ready(served: Report) -> None:
    served.phase("rollout")
    assert get(served, "/readyz") == (503, "does not train\n")
    served.update(PROGRESS)
    assert get(served, "/readyz") == (200, "ok\n")
    for phase in (ASIDE, STARTING):  # as after all of its members have died
        served.phase(phase)
        assert get(served, "/readyz")[0] == 503
    assert get(served, "/healthz")[0] == 200


def test_a_port_that_is_taken_is_a_mistake_of_the_user(served: Report) -> None:
    with pytest.raises(UserError, match=rf"--port {served.port}: .*0 for a free one"):
        Report(served.port, "127.0.0.1")
    with pytest.raises(UserError, match="--port 99999"):
        Report(99999, "127.0.0.1")
    for host in ("2001:db8::1", "192.0.2.1"):
        with pytest.raises(UserError, match=f"--host {host}: .*an address of this machine"):
            Report(0, host)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
def test_a_pod_may_have_an_address_of_either_kind() -> None:
    served = Report(0)
    for host in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{host}:{served.port}/healthz") as answer:
            assert answer.status == 200
    served.close()


def write(path: Path, updates: range) -> None:
    with MetricsFile(path) as file:
        for update in updates:
            file.append(replace(PROGRESS, update=update, frames=update * 8192))


def picture(progress: Progress, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(Picture(progress))
    return console.export_text()


def test_the_screen_fits_80_columns_and_shows_what_matters() -> None:
    text = picture(PROGRESS)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("frame 89 of 356", "25%", "in 2 min 00 s", "1 min 05 s", "2 tied, 1 lost a life"):
        assert part in text
    assert text.splitlines()[0].count("█") == 45  # three quarters of the bar are mastered


@pytest.mark.parametrize("width", [40, 60, 79])
def test_a_narrow_screen_has_every_word_of_a_wide_one(width: int) -> None:
    progress = replace(PROGRESS, episode_score_mean=1.0, episode_score_max=1.0, budget_frames=4000)
    bar, *lines = picture(progress, width).splitlines()
    assert max(map(len, [bar, *lines])) <= width
    assert len(bar) == min(width, 74)
    told = dict(re.split(" {2,}", line.strip()) for line in lines)
    pairs = re.findall(r"(\S+(?: \S+)*) {2,}(\S+(?: \S+)*)", picture(progress, 120))
    assert told == dict(pairs)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_screen_has_characters_that_the_terminal_can_show(encoding: str) -> None:
    large = replace(PROGRESS, outcomes=dict.fromkeys(("BEHIND", "LIFE_LOST", "SUCCESS"), 12_345))
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(width=80, file=shown).print(Picture(large))
    shown.seek(0)
    assert shown.readline().strip() == "game's start " + 15 * "." + 45 * "#"
    assert shown.read().isascii()


def test_a_character_that_stdout_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    monkeypatch.setattr(plot, "plot", lambda *_: None)
    assert cli.main(["plot", "x", "--out", "█.png"]) == 0
    assert printed.getvalue() == b"written: ?.png\n"


def test_the_screen_keeps_its_height_and_its_words_with_large_numbers() -> None:
    large = replace(
        PROGRESS,
        frames=1_234_567_890,
        budget_frames=2_000_000_000,
        seconds=360_000,
        start_frame=48_000,
        demo_frames=53_061,
        outcomes={"LIFE_LOST": 12_345, "SUCCESS": 4_567, "BEHIND": 789},
        episode_score_mean=1_234_567.0,
        episode_score_max=1_234_567.0,
        goal_rate=0.5,
        stall_rung=2,
    )
    text = picture(large)
    assert len(text.splitlines()) == len(picture(PROGRESS).splitlines())
    assert max(map(len, text.splitlines())) <= 80
    for part in ("learning rate", "success there", "game's start  in", "12345 lost a life"):
        assert part in text
    assert "scores        1,234,567, best 1,234,567" in text


def test_what_stays_on_the_terminal_is_the_latest_update() -> None:
    written = io.StringIO()
    screen = LiveScreen(Console(file=written, width=80, force_terminal=True))
    screen.show(PROGRESS)
    screen.show(replace(PROGRESS, start_frame=44))  # too soon after the first to be drawn at once
    assert "frame 44 of 356" not in written.getvalue()
    screen.close()
    assert "frame 44 of 356" in written.getvalue()


def test_the_screen_tells_of_a_disk_that_is_full() -> None:
    assert "NOT WRITTEN" in picture(replace(PROGRESS, checkpoint_error="no space left"))
    assert "no space left" in plain_line(replace(PROGRESS, checkpoint_error="no space left"))
    assert "score" not in plain_line(PROGRESS), "none has ended"
    assert "score 1,234  " in plain_line(replace(PROGRESS, episode_score_mean=1234.4))
    assert "frames/s" in plain_line(replace(PROGRESS, frames_per_second=900.0))


@pytest.mark.parametrize(
    ("frames", "said"), [(4096, "4,096"), (99_999, "99,999"), (123_456, "0.12 M")]
)
def test_few_frames_are_said_with_all_their_digits(frames: int, said: str) -> None:
    progress = replace(PROGRESS, frames=frames)
    assert f"  {said} frames  " in plain_line(progress)
    assert f"frames         {said} " in picture(progress)


def test_a_speed_that_is_not_known_yet_is_not_said_to_be_0() -> None:
    first = replace(PROGRESS, frames_per_second=0.0)
    assert "frames/s" not in plain_line(first)
    assert re.search("frames/s +not known yet", picture(first))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (1, "of 1 "),
        (99_999, "of 99,999 "),
        (300_000, "of 0.3 M "),
        (2_500_000, "of 2.5 M "),
        (2_000_000_000, "of 2,000 M "),
    ],
)
def test_a_budget_is_shown_as_it_was_meant(budget: int, said: str) -> None:
    assert said in picture(replace(PROGRESS, budget_frames=budget))


def test_at_the_start_it_says_how_far_the_goal_is() -> None:
    reached = replace(PROGRESS, start_frame=0, goal_rate=0.5)
    assert "50% of 90% wanted" in picture(reached)
    assert "reached" in picture(reached)
    assert "from the game's own start 50% (goal 90%)" in plain_line(reached)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_off_a_terminal_there_are_plain_lines_or_json() -> None:
    plain, structured = io.StringIO(), io.StringIO()
    for kind, stream in (("auto", plain), ("json", structured)):
        screen = make_screen(kind, stream)
        screen.show(PROGRESS)
        screen.show(PROGRESS)
        screen.note("moved")
        screen.close()
    assert plain.getvalue().splitlines() == [plain_line(PROGRESS), "moved"]  # one every few seconds
    lines = [json.loads(line) for line in structured.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["update", "update", "note"]
    assert lines[0]["start_frame"] == 89


def test_words_before_or_after_the_screen_are_json_as_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in ("json", "plain"):
        tell("Goal met.\nNext: x", kind)
    structured, *plain = capsys.readouterr().out.splitlines()
    assert json.loads(structured)["event"] == "note"
    assert json.loads(structured)["text"].splitlines() == plain == ["Goal met.", "Next: x"]


@pytest.mark.parametrize("kind", ["screen", "plain", "json"])
@pytest.mark.parametrize("full", [True, False])
def test_words_that_nobody_can_take_end_nothing(kind: str, full: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = open("/dev/full" if full else writer, "w")  # noqa: SIM115
    screen = make_screen(kind, stream)
    screen.show(PROGRESS)
    screen.note("moved")
    screen.close()
    with suppress(OSError):
        stream.close()


@pytest.mark.parametrize("kind", ["screen", "plain", "json"])
def test_words_that_an_encoding_lacks_end_nothing(kind: str) -> None:
    screen = make_screen(kind, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    screen.note("█")
    screen.show(PROGRESS)
    screen.close()


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, "w") as terminal:
        for kind, live in (("dumb", False), ("xterm", True)):
            monkeypatch.setenv("TERM", kind)
            assert isinstance(make_screen("auto", terminal), LiveScreen) is live


def test_the_graph_says_whether_the_guide_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    runs = []
    for number, curriculum in enumerate([{}, {"guide": 0}, None]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder / metrics.NAME, range(1, 9))
        content = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "x"}}
        if curriculum is not None:  # else there are metrics alone
            content["spec"] = {"demo": {"name": "x"}, "curriculum": curriculum}
            run_folder.write_json(folder / run_folder.SPEC, content)
        runs.append(folder)
    said = [f"{runs[0]}, guide 0.1", f"{runs[1]}, pure reinforcement learning", str(runs[2])]
    for folder, title in zip(runs, said, strict=True):
        plot.plot([folder], tmp_path / "graph.png")
        assert drawn[-1].get_suptitle() == title
    plot.plot(runs, tmp_path / "graph.png")
    legend = drawn[-1].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == said
    monkeypatch.undo()
    for figure in drawn:
        pyplot.close(figure)


def test_a_graph_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / metrics.NAME, range(1, 9))
    graph = tmp_path / "plot.png"
    graph.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for flags in ([], ["--out", str(tmp_path / "new.png")]):
            assert cli.main(["plot", str(tmp_path), *flags]) == 64
            said = "cannot be written: File too large; choose another place with --out\n"
            assert capsys.readouterr().err.endswith(said)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert graph.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [metrics.NAME, "plot.png"]


def test_a_graph_is_drawn_anew_but_not_over_a_file_that_was_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / metrics.NAME, range(1, 9))
    for name in ("plot.png", "mine.png"):
        (tmp_path / name).write_bytes(b"old")
    named = ["plot", str(tmp_path), "--out", str(tmp_path / "mine.png")]
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert cli.main(named) == 64
    assert "mine.png is there already; --force overwrites it" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"old"
    assert cli.main([*named, "--force"]) == 0
    for name in ("plot.png", "mine.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_graph_shows_several_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / metrics.NAME, range(1, 9))
    out = tmp_path / "graph.png"
    plot.plot([tmp_path / "a", tmp_path / "b"], out)
    assert out.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "begun").mkdir()
    write(tmp_path / "begun" / metrics.NAME, range(0))
    with pytest.raises(UserError, match=r"begun: no update is done yet"):
        plot.plot([tmp_path / "begun"], out)
    with pytest.raises(UserError, match=r"nowhere.*give a run's folder"):
        plot.plot([tmp_path / "nowhere"], out)
