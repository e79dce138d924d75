"""The API server, as all but the watches speak to it: those are kopf's."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from urllib.request import getproxies

import aiohttp
from kubernetes.aio import client, config

from demoreset_api.names import GROUP, OPERATOR_NAME, PLURAL, VERSION
from demoreset_operator.observation import Json

# Where objects of a kind are.
PATHS = {
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Event": ("/api/v1", "events"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "DemoResetRun": (f"/apis/{GROUP}/{VERSION}", PLURAL),
}
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
TRIES, FIRST_WAIT, LONGEST_WAIT = 5, 0.2, 5.0  # of a request that the server did not take
REQUEST_SECONDS = 30.0
PAGE = 100  # objects of an answer: what it takes to read it, a process never gives back
CONNECTIONS = 16  # at most, open at once: each has a quarter of a MiB for what it reads


class ApiError(Exception):
    """The API server refused a request; `code` is HTTP's, 0 where it was not reached."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}" if code else message)
        self.code = code


class Api:
    """Requests, repeated where the server was busy or away.

    Args:
        counted: Told the verb and the code of every request.
    """

    def __init__(self, counted: Callable[[str, int], None] = lambda verb, code: None) -> None:
        self._counted = counted
        self._client: client.ApiClient | None = None

    async def connect(self) -> None:
        """Connect: in a pod by its service account, elsewhere by the kubeconfig."""
        settings = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=settings)
        settings.connection_pool_maxsize = CONNECTIONS
        # Else ~/.netrc and the proxies are looked up for every request: a sixth of all our time.
        settings.client_session_kwargs = {"trust_env": bool(getproxies())}
        self._client = client.ApiClient(settings)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.close()

    async def get(self, kind: str, namespace: str, name: str) -> Json | None:
        """An object; None where there is none."""
        try:
            return await self._request("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, selector: str) -> AsyncIterator[Json]:
        """All objects of a kind, of one namespace or ("") of all."""
        more = ""
        while True:
            query = [("limit", str(PAGE)), ("labelSelector", selector), ("continue", more)]
            answer = await self._request(
                "GET", _path(kind, namespace), query=tuple(one for one in query if one[1])
            )
            for body in answer["items"]:
                yield body
            more = answer["metadata"].get("continue") or ""
            if not more:
                return

    async def create(self, body: Json, *, dry_run: bool = False) -> Json | None:
        """Make an object, or only ask whether it would be taken; None where it is there already."""
        path = _path(body["kind"], body["metadata"]["namespace"])
        query = (*_STRICT, ("dryRun", "All")) if dry_run else _STRICT
        try:
            return await self._request("POST", path, body, query=query)
        except ApiError as error:
            if error.code == 409 and "already exists" in str(error):
                return None
            raise

    async def apply(self, body: Json) -> Json:
        """Make an object, or make it so (server-side apply)."""
        path = _path(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._request("PATCH", path, body, content=APPLY, query=_FIELDS)

    async def apply_status(self, body: Json) -> Json:
        """Make an object's status so."""
        path = _path(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._request("PATCH", path + "/status", body, content=APPLY, query=_FIELDS)

    async def replace(self, body: Json) -> Json:
        """Put an object in the place of the one that was read."""
        path = _path(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._request("PUT", path, body)

    async def patch(self, kind: str, namespace: str, name: str, change: Json) -> Json:
        """Change some of an object (merge patch)."""
        return await self._request("PATCH", _path(kind, namespace, name), change, content=MERGE)

    async def delete(
        self, kind: str, namespace: str, name: str, uid: str = "", version: str = ""
    ) -> Json | None:
        """Delete an object, if it still is the one with this UID, and in this resourceVersion.

        Where none is there, or another one, do nothing.

        Returns:
            The object, where it is to end before it is gone.
        """
        body: Json = {"propagationPolicy": "Background"}
        wanted = {"uid": uid, "resourceVersion": version}
        if preconditions := {key: value for key, value in wanted.items() if value}:
            body["preconditions"] = preconditions
        try:
            answer = await self._request("DELETE", _path(kind, namespace, name), body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise
            return None
        return answer if "deletionTimestamp" in answer.get("metadata", {}) else None

    async def _request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content: str = "application/json",
        query: tuple[tuple[str, str], ...] = (),
    ) -> Json:
        assert self._client is not None, "connect first"
        attempt, wait = 1, FIRST_WAIT
        while True:
            headers = {"Accept": "application/json", "Content-Type": content}
            code, text, after = 0, "", None
            try:
                made = await self._client.param_serialize(
                    method,
                    path,
                    query_params=list(query),
                    header_params=headers,
                    body=body,
                    auth_settings=["BearerToken"],
                )
                response = await self._client.call_api(*made, _request_timeout=REQUEST_SECONDS)
                text = (await response.read()).decode()
                code, after = response.status, response.getheader("Retry-After")
            except (OSError, aiohttp.ClientError) as error:
                text = f"the API server is not reached: {error or type(error).__name__}"
            self._counted(method, code)
            if 200 <= code < 300:
                answer: Json = json.loads(text)
                return answer
            if attempt == TRIES or not (code == 0 or code == 429 or code >= 500):
                raise ApiError(code, _message(text))
            pause = float(after) if after and after.isdigit() else wait
            await asyncio.sleep(min(pause, LONGEST_WAIT) * random.uniform(0.8, 1.2))
            attempt, wait = attempt + 1, min(2 * wait, LONGEST_WAIT)


_STRICT = (("fieldValidation", "Strict"),)  # else what a run misspells for its pods is left out
_FIELDS = (("fieldManager", OPERATOR_NAME), ("force", "true"))


def _path(kind: str, namespace: str, name: str | None = None) -> str:
    base, plural = PATHS[kind]
    path = f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"
    return path if name is None else f"{path}/{name}"


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        return text[:500]
