"""When a run stands still: it has done no update for much longer than its own take."""

QUIET = 120.0  # seconds that no run stands still before
GAPS = 20.0  # of an update's usual length


def patience(updates: int, seconds: float) -> float:
    """Seconds without an update after which a run stands still.

    Args:
        updates: That it has done.
        seconds: That they took.
    """
    return max(QUIET, GAPS * seconds / updates) if updates else QUIET
