"""The API server of a world over HTTP, for kopf and the operator's Api: lists, watches, requests.

What nobody should ask is refused and noted: another path, verb, selector or namespace, and whatever
kopf would write.
"""

import asyncio
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import kopf
import pytest
from aiohttp import web
from kubernetes.aio.config import kube_config

from apiserver import Server, copied, fits
from demoreset_api.names import KIND, OPERATOR_NAME
from demoreset_operator.api import APPLY, PATHS, ApiError
from demoreset_operator.watch import CHILDREN, OURS
from world import Json

PATH = re.compile(
    r"(/apis?(?:/[a-z0-9.]+)?/v[a-z0-9]+)(?:/namespaces/(\w+))?/(\w+)(?:/([\w.-]+))?(/status)?"
)
KINDS = {where: kind for kind, where in PATHS.items()}
# Kopf wants to know where these are, though nobody asks for them.
UNUSED = {
    "Namespace": ("/api/v1", "namespaces"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
}


def only_here(monkeypatch: pytest.MonkeyPatch, kubeconfig: Path) -> None:
    """Where kopf and the Api find the server, whatever machine this is."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    monkeypatch.setattr(kopf, "login_with_service_account", lambda **_: None)
    for name in ("KUBERNETES_SERVICE_HOST", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


class Port:
    """A server's port on this machine.

    namespaces: that may be asked for; "" is all at once. known: kinds that there are. deaf: kinds
    whose watches tell nothing. asked: how often each verb came for a kind. refused: what was.
    """

    def __init__(self, server: Server, *namespaces: str) -> None:
        self.server, self.namespaces = server, namespaces or ("",)
        self.known = {KIND, *CHILDREN}
        self.deaf: set[str] = set()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.refused: list[str] = []
        self.away = ""  # why nothing can be written
        self.forbidden: set[str] = set()  # namespaces that cannot be listed any more
        self._forgotten = 0  # versions that no watch can begin from
        self._pages: dict[str, tuple[list[Json], int]] = {}
        self._count = itertools.count()
        self._watches: list[tuple[str, web.Request]] = []

    async def open(self, kubeconfig: Path) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._respond)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        content = {
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": url}}],
            "users": [{"name": "it", "user": {}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        }
        kubeconfig.write_text(json.dumps(content))

    async def close(self) -> None:
        self.cut(*self.known)
        await self._runner.cleanup()

    def cut(self, *kinds: str) -> None:
        """Connections of watches break; those that begin anew come later."""
        for kind, request in self._watches:
            if kind in kinds and request.transport is not None:
                request.transport.abort()

    def forget(self) -> None:
        """No watch can go on from what was until now."""
        self.server.notice()
        self._forgotten = self.server.version

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        try:
            found = self._found(request.path)
            if found is not None:
                return web.json_response(found)
            return await self._take(request)
        except ApiError as error:
            return _refusal(error.code, str(error))
        except (AssertionError, KeyError) as error:
            self.refused.append(f"{request.method} {request.path_qs}: {error!r}")
            return _refusal(400, repr(error))

    def _found(self, path: str) -> Json | None:
        """What kopf looks up once: groups, versions and kinds."""
        all_kinds = {kind: PATHS[kind] for kind in self.known} | UNUSED
        groups = sorted({base for base, _ in all_kinds.values()} - {"/api/v1"})
        if path == "/api":
            return {"versions": ["v1"]}
        if path == "/apis":
            return {"groups": [_group(*base.split("/")[2:]) for base in groups]}
        if path not in {base for base, _ in all_kinds.values()}:
            return None
        resources = [
            {
                "kind": kind,
                "name": plural,
                "singularName": kind.lower(),
                "namespaced": True,
                "verbs": ["create", "delete", "get", "list", "patch", "watch"],
            }
            for kind, (base, plural) in all_kinds.items()
            if base == path
        ]
        return {"resources": resources}

    async def _take(self, request: web.Request) -> web.StreamResponse:
        matched = PATH.fullmatch(request.path)
        assert matched is not None, "no such path"
        base, namespace, plural, name, status = matched.groups(default="")
        kind, query = KINDS[base, plural], dict(request.query)
        verb = "WATCH" if "watch" in query else request.method
        self.asked[verb, kind] += 1
        if request.method == "GET" and not name:
            assert namespace in self.namespaces, "another namespace"
            if namespace in self.forbidden:
                raise ApiError(403, "our Role is gone")
            selector = query.pop("labelSelector", "")
            assert selector == ("" if kind == KIND else OURS), "another selector"
            if verb == "WATCH":
                return await self._watch(request, kind, namespace, selector, query)
            return web.json_response(self._list(kind, namespace, selector, query))
        assert not request.headers["User-Agent"].startswith("kopf/"), "kopf writes nothing"
        applied = {"fieldManager": OPERATOR_NAME, "force": "true"}
        strict = {"fieldValidation": "Strict"}
        right = {"PATCH": applied, "POST": strict}.get(request.method, {})
        assert query == right, "another query"
        if self.away:
            raise ApiError(403, self.away)
        if (request.method, kind) == ("GET", "Lease"):
            if (lease := await self.server.get(kind, namespace, name)) is None:
                raise ApiError(404, "not found")
            return web.json_response(lease)
        body = await request.json()
        match request.method, status, request.content_type:
            case "POST", "", "application/json":
                if (answer := await self.server.create(body)) is None:
                    raise ApiError(409, "it already exists")
            case "PATCH", "", content if content == APPLY:
                answer = await self.server.apply(body)
            case "PATCH", "/status", content if content == APPLY:
                answer = await self.server.apply_status(body)
            case "PUT", "", "application/json":
                answer = await self.server.replace(body)
            case "DELETE", "", "application/json":
                wanted = body["preconditions"]
                its = wanted.pop("uid"), wanted.pop("resourceVersion", "")
                assert not wanted, "nobody asks for more"
                answer = await self.server.delete(kind, namespace, name, *its) or {}
            case _:
                raise AssertionError("nobody asks for this")
        return web.json_response(answer)

    def _list(self, kind: str, namespace: str, selector: str, query: dict[str, str]) -> Json:
        most, page = int(query.pop("limit")), query.pop("continue", "")
        assert not query, "nobody asks for more"
        self.server.notice()
        if page:
            content, version = self._pages.pop(page)
        else:
            content = copied(self.server.found(kind, namespace, selector))
            version = self.server.version
        more = ""
        if len(content) > most:
            more = f"page-{next(self._count)}"
            self._pages[more] = content[most:], version
        meta = {"resourceVersion": str(version), "continue": more}
        return {"kind": f"{kind}List", "metadata": meta, "items": content[:most]}

    async def _watch(
        self,
        request: web.Request,
        kind: str,
        namespace: str,
        selector: str,
        query: dict[str, str],
    ) -> web.StreamResponse:
        since = int(query.pop("resourceVersion"))
        assert query.keys() == {"watch", "allowWatchBookmarks", "timeoutSeconds"}
        self._watches.append((kind, request))
        response = web.StreamResponse()
        await response.prepare(request)
        if since < self._forgotten:
            gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
            await response.write(_line("ERROR", gone))
            return response
        while request.transport is not None and not request.transport.is_closing():
            self.server.notice()
            if kind not in self.deaf:
                news, since = self.server.log[since:], len(self.server.log)
                for change, body in news:
                    if fits(body, kind, namespace, selector):
                        await response.write(_line(change, body))
            await asyncio.sleep(0.005)
        return response


def _group(group: str, version: str) -> Json:
    its = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [its], "preferredVersion": its}


def _line(change: str, body: Json) -> bytes:
    return json.dumps({"type": change, "object": body}).encode() + b"\n"


def _refusal(code: int, message: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "message": message}
    return web.json_response(body, status=code)
