"""Where a member stood that did not go on, kept in the run's folder for whoever looks into it."""

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

FOLDER = "hangs"
VOLUME_ANSWERS = 0.5  # seconds that a volume is given
KEPT = 20  # files; of a run that hangs again and again the latest tell enough


def keep(folder: Path, member: str, lines: Sequence[str]) -> str:
    """Write what a member said; returns where.

    It is written beside, and hardly waited for: the volume may be what hangs.

    Args:
        folder: The run's.
        member: Its id.
        lines: The stacks of its threads, and what it wrote with them.
    """
    path = folder / FOLDER / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{member}.txt"
    writer = threading.Thread(target=_write, args=(path, lines), daemon=True, name="hang")
    writer.start()
    writer.join(VOLUME_ANSWERS)
    return f"{FOLDER}/{path.name}"


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
        for old in sorted(path.parent.glob("*.txt"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        pass  # the lines went to the log as well
