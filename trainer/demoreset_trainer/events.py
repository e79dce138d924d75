"""What happened to a member, with times that compare over processes: for measurements of faults."""

import json
import os
import time
from typing import Any

from demoreset_api.names import ENV_EVENTS


class Events:
    """Appends lines of JSON to the file that DEMORESET_EVENTS names; without it does nothing.

    Args:
        member: To whom it happens; "" for the nursery that it comes from.
    """

    def __init__(self, member: str) -> None:
        path = os.environ.get(ENV_EVENTS)
        self._member = member
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if path else None

    def tell(self, event: str, **facts: Any) -> None:
        """Write a line; `time` is that of CLOCK_MONOTONIC, one clock for the whole machine.

        A fact that costs time to find is given as a function.
        """
        if self._file is None:
            return
        line = {
            "time": time.monotonic(),
            "member": self._member,
            "pid": os.getpid(),
            "event": event,
            **{name: fact() if callable(fact) else fact for name, fact in facts.items()},
        }
        os.write(self._file, json.dumps(line).encode() + b"\n")
