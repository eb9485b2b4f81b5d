"""A local server that speaks the part of the Hugging Face hub's HTTP API that downloads use.

Paths and headers as in https://huggingface.co/docs/hub/api and huggingface_hub/file_download.py.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, each a table of files. `requests` are (method, path, Range)."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.gated: set[str] = set()
        self.revisions = {"main", "v2", COMMIT}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_at: dict[str, int] = {}
        """Bytes after which the connection of a file's first download breaks."""
        self.hold: str | None = None
        """A file whose first download never gets past the headers."""
        self._closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.serve(self, body=True)

            def do_HEAD(self) -> None:
                hub.serve(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def downloaded(self) -> list[str]:
        """Names of the files of which a body was asked for, as often as it was."""
        found = [
            re.search(r"/resolve/[^/]+/(.*)", path) for m, path, _ in self.requests if m == "GET"
        ]
        return sorted(match[1] for match in found if match)

    def serve(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(request.path.partition("?")[0])
        self.requests.append((request.command, path, request.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            if files := self._files(request, match[1], match[3] or "main"):
                siblings = [{"rfilename": name} for name in files]
                info = {"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings}
                self._json(request, info, body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            if files := self._files(request, match[1], match[2]):
                tree = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
                self._json(request, tree, body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if files := self._files(request, match[1], match[2]):
                self._send_file(request, match[3], files.get(match[3]), body)
        else:
            self._error(request, 404, "", "no such page")

    def _files(self, request: Any, name: str, revision: str) -> dict[str, bytes] | None:
        if name not in self.repositories:
            self._error(request, 401, "RepoNotFound", "Invalid username or password.")
        elif name in self.gated:
            text = f"Access to model {name} is restricted. You must have access to it."
            self._error(request, 403, "GatedRepo", text)
        elif revision not in self.revisions:
            self._error(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return self.repositories[name]
        return None

    def _error(self, request: Any, status: int, code: str, message: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _json(self, request: Any, value: Any, body: bool) -> None:
        data = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)

    def _send_file(self, request: Any, name: str, data: bytes | None, body: bool) -> None:
        if data is None:
            return self._error(request, 404, "EntryNotFound", "Entry not found")
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-.*", request.headers.get("Range") or ""):
            start = int(match[1])
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if not body:
            return None
        if self.hold == name:
            self.hold = None
            request.wfile.flush()
            self._closing.wait()
        stop = self.cut_at.pop(name, len(data))
        request.wfile.write(data[start:stop])
        request.close_connection = stop < len(data)
        return None
