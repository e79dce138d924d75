"""What `helm test` asks, in a pod: does the API server know runs, and is the operator ready?"""

import os
import ssl
import sys
import time
import urllib.request

PATIENCE = 60.0  # seconds
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


def ask(url: str) -> None:
    """Raise OSError unless it answers with 200; its answer is not of interest."""
    request, context = urllib.request.Request(url), None
    if url.startswith("https://"):
        with open(f"{ACCOUNT}/token") as file:
            request.add_header("Authorization", f"Bearer {file.read().strip()}")
        context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
    with urllib.request.urlopen(request, timeout=5, context=context):
        pass


def main() -> None:
    """Ask both until they answer or patience is over."""
    until = time.monotonic() + PATIENCE
    for what, url in (
        ("runs are served", "https://kubernetes.default.svc" + os.environ["RUNS"] + "?limit=1"),
        ("the operator is ready", os.environ["OPERATOR"] + "/readyz"),
    ):
        while True:
            try:
                ask(url)
            except OSError as error:
                if time.monotonic() > until:
                    sys.exit(f"not so: {what}: {url}: {error}")
                time.sleep(1)
            else:
                print(what, flush=True)
                break


if __name__ == "__main__":
    main()
