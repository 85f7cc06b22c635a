"""A model hub on loopback with as much of the real one's API as ``huggingface_hub`` uses.

It can break off in the middle of a file, be down, and hand out other bytes than it lists.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 50_000
"""Files of more bytes are listed as large ones, with a SHA-256."""


class Hub:
    """Repositories by id; each is a dict of branch or commit → commit, and of commit → folder."""

    def __init__(self) -> None:
        self.refs: dict[str, dict[str, str]] = {}
        self.folders: dict[tuple[str, str], Path] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None  # bytes of a large file
        self.down = False  # for downloads of large files
        self.url = ""

    def publish(self, name: str, folder: Path, *, branch: str = "main") -> str:
        """Add the state of a folder as a commit that ``branch`` points at; gives the commit."""
        content = b"".join(
            path.name.encode() + path.read_bytes() for path in sorted(folder.iterdir())
        )
        commit = hashlib.sha1(content).hexdigest()
        self.refs.setdefault(name, {}).update({branch: commit, commit: commit})
        self.folders[name, commit] = folder
        return commit

    @property
    def downloads(self) -> list[str]:
        """Names of the files that were asked for with GET."""
        return [
            path.rpartition("/")[2]
            for verb, path in map(str.split, self.requests)
            if verb == "GET" and "/resolve/" in path
        ]


def listing(folder: Path) -> list[dict[str, Any]]:
    """Files as the hub describes them: a git id, and for large ones the SHA-256."""
    rows = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        sha256 = hashlib.sha256(content).hexdigest()
        rows.append(
            {
                "name": path.name,
                "size": len(content),
                "blob": blob,
                "sha256": sha256 if len(content) > LARGE else None,
            }
        )
    return rows


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name, rest = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
        rest = rest or ["revision", "main"]
        refs = self.hub.refs.get(name)
        if refs is None:
            return self._refuse(404, "RepoNotFound")
        commit = refs.get(rest[1])
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        folder = self.hub.folders[name, commit]
        if api:
            return self._send_json(
                self._info(name, commit, folder) if rest[0] == "revision" else self._tree(folder)
            )
        return self._send_file(folder / rest[2], commit, body)

    def _info(self, name: str, commit: str, folder: Path) -> dict[str, Any]:
        files = [
            {"rfilename": row["name"], "size": row["size"], "blobId": row["blob"]}
            | (
                {"lfs": {"sha256": row["sha256"], "size": row["size"], "pointerSize": 130}}
                if row["sha256"]
                else {}
            )
            for row in self._listed(folder)
        ]
        return {
            "id": name,
            "sha": commit,
            "private": False,
            "downloads": 0,
            "tags": [],
            "siblings": files,
        }

    def _tree(self, folder: Path) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": row["name"], "size": row["size"], "oid": row["blob"]}
            | (
                {"lfs": {"oid": row["sha256"], "size": row["size"], "pointerSize": 130}}
                if row["sha256"]
                else {}
            )
            for row in self._listed(folder)
        ]

    def _listed(self, folder: Path) -> list[dict[str, Any]]:
        kept = folder / "listing.json.kept"  # what was listed before the bytes changed
        if not kept.exists():
            return listing(folder)
        rows: list[dict[str, Any]] = json.loads(kept.read_text())
        return rows

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path, commit: str, body: bool) -> None:
        content = path.read_bytes()
        large = len(content) > LARGE
        if large and body and self.hub.down:
            return self._refuse(503, "Down")
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(
            206 if first else 200,
            content[first:],
            headers,
            body=body,
            cut=self.hub.cut_after if large else None,
        )

    def _send(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        *,
        body: bool = True,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if cut is not None and cut < len(content):
            self.wfile.write(content[:cut])
            self.wfile.flush()
            self.hub.down = True  # until somebody starts it again
            self.close_connection = True
            return
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that nobody has published anything on yet."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
