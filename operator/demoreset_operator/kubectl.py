"""kubectl, as a person calls it: their rights, and the context and namespace that they name."""

import json
import subprocess
import sys
from dataclasses import dataclass

from pydantic import ValidationError

from demoreset_api.errors import UserError
from demoreset_api.names import GROUP, PLURAL
from demoreset_operator.observation import Json, Run, not_understood, parse_run

RESOURCE = f"{PLURAL}.{GROUP}"


@dataclass(frozen=True)
class Kubectl:
    """Calls kubectl; raises UserError with what it says where it fails."""

    namespace: str | None = None
    context: str | None = None

    def command(self, *words: str) -> list[str]:
        """A command line, to be run by somebody else."""
        where = ["--namespace", self.namespace] if self.namespace else []
        where += ["--context", self.context] if self.context else []
        return ["kubectl", *where, *words]

    def run(self, *words: str, given: str | None = None) -> str:
        """What it says, after it was given a text."""
        try:
            done = subprocess.run(self.command(*words), input=given, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("kubectl is not on the PATH") from error
        if done.returncode:
            raise UserError(done.stderr.strip())
        print(done.stderr, end="", file=sys.stderr)  # warnings, and that nothing was found
        return done.stdout

    def get(self, *what: str) -> Json:
        """What the API server has: an object, or a list of them."""
        return dict(json.loads(self.run("get", *what, "-o", "json")))

    def body(self, name: str) -> Json:
        """A run, whatever it says."""
        return self.get(RESOURCE, name)

    def read(self, name: str) -> tuple[Json, Run]:
        """A run, as it is and as this version understands it."""
        body = self.body(name)
        try:
            return body, parse_run(body)
        except ValidationError as error:
            raise UserError(
                f"this version does not know what {name} says: {not_understood(error)}; "
                "upgrade the plugin, or see `kubectl describe`"
            ) from error


def runs(pod: Json) -> bool:
    """Whether a pod runs, and is to go on running."""
    gone = "deletionTimestamp" in pod["metadata"]
    return pod["status"].get("phase") == "Running" and not gone
