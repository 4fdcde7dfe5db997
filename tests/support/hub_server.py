"""A local Hugging Face hub: the routes that huggingface_hub uses, over HTTP."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from attrs import define, field

Files = dict[str, bytes]


def files_of(directory: Path) -> Files:
    """A directory as a repository's files."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def commit_of(files: Files) -> str:
    made = hashlib.sha1()
    for path, data in sorted(files.items()):
        made.update(f"{path} {len(data)} ".encode() + data)
    return made.hexdigest()


@define
class Hub:
    """Repositories by id, and the failures to simulate."""

    repositories: dict[str, dict[str, Files]] = field(factory=dict)
    """Revision -> files, for each repository."""
    gated: set[str] = field(factory=set)
    token: str | None = None
    """The token that private repositories require."""
    private: set[str] = field(factory=set)
    broken: dict[str, list[int]] = field(factory=dict)
    """File -> the number of bytes after which each of the next responses breaks off."""
    failing: int = 0
    """An HTTP status for every response; 0: none."""
    stalled: threading.Event = field(factory=threading.Event)
    stall: tuple[str, int] = "", 0
    """A file and the number of bytes after which it stalls until ``stalled`` is set."""
    tells_sizes: bool = True
    """Whether the description of a repository gives the sizes of files."""
    requests: list[tuple[str, str, str]] = field(factory=list)
    """Method, path and Range of each request."""
    endpoint: str = ""

    def add(self, name: str, files: Files, revision: str = "main") -> str:
        """Store files under a revision and under their commit; returns the commit."""
        revisions = self.repositories.setdefault(name, {})
        commit = commit_of(files)
        revisions[revision] = revisions[commit] = files
        return commit

    def downloads(self) -> list[str]:
        """The files that were asked for with GET, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]  # fmt: skip


class _Server(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        pass  # tests disconnect clients on purpose


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = _Server(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    # A short poll interval, since each test waits for the server to stop.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.stalled.set()
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            url = urlsplit(self.path)
            hub.requests.append((self.command, url.path, self.headers.get("Range", "")))
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if hub.failing:
                return self.refuse(hub.failing, "", "out of order")
            api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if api else parts[:2])
            rest = parts[4:] if api else parts[2:]
            revisions = hub.repositories.get(name)
            bearer = self.headers.get("authorization", "")
            if bearer and hub.token and bearer != f"Bearer {hub.token}":
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if revisions is None or (name in hub.private and not bearer):
                return self.refuse(401, "RepoNotFound", "Repository not found")
            if name in hub.gated and not api:
                return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in revisions:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = revisions[revision]
            if api and rest[:1] == ["tree"]:
                return self.json(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                        for path, data in files.items()
                    ]
                )
            if api:
                sized = hub.tells_sizes and "blobs" in parse_qs(url.query)
                siblings = [
                    {"rfilename": path} | ({"size": len(data)} if sized else {})
                    for path, data in files.items()
                ]
                return self.json({"id": name, "sha": commit_of(files), "siblings": siblings})
            path = "/".join(rest[2:])
            if path not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.file(path, files[path], commit_of(files))

        def json(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def file(self, path: str, data: bytes, commit: str) -> None:
            start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0] or 0)
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{_etag(data)}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.broken.get(path):
                self.wfile.write(data[start : start + hub.broken[path].pop(0)])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
            name, stop = hub.stall
            if path == name and not hub.stalled.is_set():
                self.wfile.write(data[start:stop])
                self.wfile.flush()
                hub.stalled.wait(120)
                start = max(start, stop)
            self.wfile.write(data[start:])

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
