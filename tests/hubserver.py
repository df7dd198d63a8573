"""A local server that plays the hub: its API of a repository, and its files.

As the real one it answers `GET /api/models/USER/MODEL[/revision/REV]?blobs=true`, and sends who
asks for `/USER/MODEL/resolve/COMMIT/FILE` on: small files to a path of its own, large ones (LFS) to
another host, where the token must not go. `faults` makes it misbehave, once for each entry.
Tests get one by the fixture `server`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from keelback.convert import pull
from keelback.convert.pull import Wanted
from keelback.kernels.errors import InvalidInput

#: What the fixture's hub has: a checkpoint, whose weights are LARGE, and a repository of GGUFs.
CHECKPOINT, GGUF = "user/mamba-tied", "user/mamba-GGUF"
LARGE = "model.safetensors"
#: Files from this size on are in LFS.
IN_LFS = 200


def commit(files: dict[str, bytes]) -> str:
    """The commit of a repository's content."""
    seal = hashlib.sha1()
    for name in sorted(files):
        seal.update(name.encode() + files[name])
    return seal.hexdigest()


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as the API lists it with its blobs."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) >= IN_LFS:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 135}
    return entry


class HubServer:
    """The hub at `address`, and the host of its large files.

    repos: repository -> file -> content. tokens: gated repository -> the token that may read it.
    faults: file -> what its next downloads do, in order: "drop" (half of it, then the connection
    breaks), "500", "html", "short", "long", "flip", "loop", "whole" (Range is ignored),
    "416", "slow". listing: changes what the API says about a repository.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.tokens: dict[str, str] = {}
        self.faults: dict[str, list[str]] = {}
        self.listing: Callable[[dict[str, Any]], Any] = lambda entry: entry
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._closing = threading.Event()
        self._servers = [self._start(), self._start()]
        self.address, self.store = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def _start(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        """Shut down; nothing answers afterwards."""
        self._closing.set()
        while self._servers:
            server = self._servers.pop()
            server.shutdown()
            server.server_close()

    def downloads(self) -> list[str]:
        """The files that were asked for, in order."""
        return [path.rsplit("/", 1)[1] for path, _ in self.requests if "/resolve/" in path]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a request for the API, a file's address, or a file's content."""
        parts = [unquote(part) for part in urlsplit(request.path).path.strip("/").split("/")]
        if parts[0] == "api":
            self._answer_api(request, "/".join(parts[2:4]), parts[5] if len(parts) > 4 else "main")
        elif parts[0] in ("lfs", "cache"):
            repo, name = "/".join(parts[1:3]), "/".join(parts[3:])
            self._send_file(request, name, self.repos[repo][name])
        else:
            self._send_on(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _answer_api(self, request: BaseHTTPRequestHandler, repo: str, revision: str) -> None:
        files = self.repos.get(repo)
        if files is None:
            refuse(request, 401, "RepoNotFound")
        elif revision not in ("main", commit(files)):
            refuse(request, 404, "RevisionNotFound")
        else:
            entries = [sibling(name, content) for name, content in files.items()]
            entry = {"id": repo, "sha": commit(files), "siblings": entries}
            told = self.listing(entry)
            body = told if isinstance(told, bytes) else json.dumps(told).encode()
            reply(request, 200, body, {"Content-Type": "application/json"})

    def _send_on(
        self, request: BaseHTTPRequestHandler, repo: str, revision: str, name: str
    ) -> None:
        files = self.repos.get(repo, {})
        wanted = self.tokens.get(repo)
        if wanted is not None and request.headers.get("Authorization") != f"Bearer {wanted}":
            refuse(request, 403, "GatedRepo")
        elif revision != commit(files) or name not in files:
            refuse(request, 404, "EntryNotFound")
        else:
            entry = sibling(name, files[name])
            large = "lfs" in entry
            where = f"{self.store}/lfs" if large else "/cache"
            etag = entry["lfs"]["sha256"] if large else entry["blobId"]
            headers = {"X-Repo-Commit": revision, "X-Linked-Size": str(entry["size"])}
            headers |= {"X-Linked-Etag": f'"{etag}"', "Location": f"{where}/{repo}/{name}"}
            reply(request, 302 if large else 307, b"", headers)

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, content: bytes) -> None:
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault in ("500", "416"):
            return reply(request, int(fault), b"")
        if fault == "loop":
            return reply(request, 302, b"", {"Location": request.path})
        if fault == "html":
            return reply(request, 200, b"<html>log in</html>", {"Content-Type": "text/html"})
        first, span = 0, request.headers.get("Range")
        if span is not None and fault != "whole":
            first = int(span.removeprefix("bytes=").removesuffix("-"))
        body = content[first:]
        changed = {"short": body[:-1], "long": body + b"!", "flip": body[:-1] + b"\xff"}
        body = changed.get(fault, body)
        headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        request.send_response(206 if first else 200)
        for key, value in (headers if first else {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        half = len(body) // 2 if fault in ("drop", "slow") else len(body)
        request.wfile.write(body[:half])
        request.wfile.flush()
        if fault == "slow":
            self._closing.wait(30)
        request.close_connection = half < len(body)
        return None


def reply(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    """Send a whole answer."""
    request.send_response(status)
    for key, value in (headers or {}).items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    """Send an error as the hub words it."""
    reply(request, status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})


def pulled(name: str, *, notes: list[str] | None = None, **options: Any) -> Path:
    """Pull a model in this process; returns its path."""
    return pull.pull(Wanted(name, **options), (notes if notes is not None else []).append)


def locate_fails(name: str) -> bool:
    """Whether a model is found nowhere on this machine."""
    with pytest.raises(InvalidInput, match="has not been pulled"):
        pull.locate(Wanted(name), offline=True)
    return True
