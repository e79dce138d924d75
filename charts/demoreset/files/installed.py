"""What `helm test` asks, in a pod: does the API server know runs, and does an operator act?"""

import json
import os
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 60.0  # seconds
API = "https://kubernetes.default.svc"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

T = TypeVar("T")


def ask(url: str) -> bytes:
    """Its answer; raise OSError unless that is 200."""
    request, context = urllib.request.Request(url), None
    if url.startswith("https://"):
        with open(f"{ACCOUNT}/token") as file:
            request.add_header("Authorization", f"Bearer {file.read().strip()}")
        context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    with urllib.request.urlopen(request, timeout=5, context=context) as said:
        answer: bytes = said.read()
    return answer


def lease() -> tuple[str, str]:
    """Who holds the operator's Lease, and when that was last renewed, by its holder's clock."""
    spec = json.loads(ask(API + os.environ["LEASE"])).get("spec") or {}
    if not spec.get("holderIdentity"):
        raise OSError("nobody holds the Lease: no operator runs, or none can take it; see its log")
    return spec["holderIdentity"], spec.get("renewTime") or "it was made"


def renewed(before: tuple[str, str]) -> None:
    """Raise OSError unless the Lease was taken or renewed since: clocks need not agree for that."""
    if (now := lease()) == before:
        raise OSError(f"{now[0]} holds the Lease and has not renewed it since {now[1]}: it is gone")


def so(what: str, asked: Callable[[], T], until: float) -> T:
    """Ask until it is so, or too late; what was said."""
    while True:
        try:
            answer = asked()
        except OSError as error:
            if time.monotonic() > until:
                sys.exit(f"not so: {what}: {error}")
            time.sleep(1)
        else:
            print(what, flush=True)
            return answer


def main() -> None:
    """Ask for all of it."""
    until = time.monotonic() + PATIENCE
    runs, operator = API + os.environ["RUNS"] + "?limit=1", os.environ["OPERATOR"] + "/readyz"
    so(f"runs are served ({runs})", lambda: ask(runs), until)
    so(f"an operator answers ({operator})", lambda: ask(operator), until)
    before = so("an operator holds the Lease", lease, until)
    so("it acts", lambda: renewed(before), until)


if __name__ == "__main__":
    main()
