"""A small Hub on this machine: the few endpoints that huggingface_hub uses to list and download a model.

It takes commits too. It can break downloads off, send damaged bytes, and count what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

COMMIT = "c0ffee" + "0" * 34
LARGE = ".safetensors"


class SmallHub:
    """Serves model folders under their names; `url` goes into HF_ENDPOINT."""

    def __init__(self, models: dict[str, Path], uploads: Path = Path("/none")) -> None:
        self.models, self.uploads = models, uploads
        self.private: dict[str, bool] = {}
        """Models that were made here."""
        self.branches: list[str] = []
        """Branches that were made here, and those of commits: `owner/name@branch`."""
        self.cut: Counter[str] = Counter()
        """How often the download of a file ends in its middle."""
        self.damaged: Counter[str] = Counter()
        """How often a file is sent with one wrong byte."""
        self.requests: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_POST(self) -> None:
                hub.take(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> SmallHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        """Answer one request, with all of a file, a range of it, or a broken piece."""
        path = request.path.split("?")[0].strip("/")
        parts = path.split("/")
        if path.startswith("api/models/"):
            model = "/".join(parts[2:4])
            if model not in self.models:
                return self._refuse(request, "RepoNotFound")
            return self._send(request, json.dumps(self._listing(model)).encode(), {}, with_body, "application/json")
        model, name = "/".join(parts[:2]), "/".join(parts[4:])
        file = self.models.get(model, Path("/none")) / name
        if not file.is_file():
            return self._refuse(request, "EntryNotFound" if model in self.models else "RepoNotFound")
        if with_body:
            self.requests[name] += 1
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._hashes(name, content)[0]}"', "Accept-Ranges": "bytes"}
        return self._send(request, content, headers, with_body, "application/octet-stream", name)

    def take(self, request: BaseHTTPRequestHandler) -> None:
        """Make a model or a branch, or write the files of a commit into the model's folder."""
        content = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = request.path.split("?")[0].strip("/")
        model = "/".join(path.split("/")[2:4])
        if path == "api/repos/create":
            asked = json.loads(content)
            model = "/".join(filter(None, (asked["organization"], asked["name"])))
            self.models.setdefault(model, self.uploads / model).mkdir(parents=True, exist_ok=True)
            self.private[model] = asked.get("private", False) or asked.get("visibility") == "private"
            found: dict[str, Any] = {"url": f"{self.url}/{model}", "id": model}
        elif path == "api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif "/branch/" in path:
            found = {}
            self.branches.append(f"{model}@{path.split('/branch/')[1]}")
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(content)["files"]]
            found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        else:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    (self.models[model] / line["value"]["path"]).write_bytes(b64decode(line["value"]["content"]))
            self.branches.append(f"{model}@{path.split('/commit/')[1]}")
            found = {"commitUrl": f"{self.url}/{model}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        self._send(request, json.dumps(found).encode(), {}, True, "application/json")

    def _send(
        self, request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str], with_body: bool, kind: str,
        name: str = "",
    ) -> None:  # fmt: skip
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if with_body else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for header, value in {"Content-Type": kind, "Content-Length": str(len(content) - start), **headers}.items():
            request.send_header(header, value)
        request.end_headers()
        if not with_body:
            return
        body = content[start:]
        if self.damaged[name]:
            self.damaged[name] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.cut[name]:
            self.cut[name] -= 1
            body = body[: len(body) // 2]
            request.close_connection = True
        request.wfile.write(body)

    def _refuse(self, request: BaseHTTPRequestHandler, code: str) -> None:
        request.send_response(404)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _listing(self, model: str) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.models[model].iterdir()):
            tag, size = self._hashes(path.name, path.read_bytes()), path.stat().st_size
            large = {"lfs": {"sha256": tag[0], "size": size, "pointerSize": 134}} if path.name.endswith(LARGE) else {}
            siblings.append({"rfilename": path.name, "size": size, "blobId": tag[1], **large})
        return {"_id": "1", "id": model, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    @staticmethod
    def _hashes(name: str, content: bytes) -> tuple[str, str]:
        """The ETag, which is the sha256 of large files, and git's hash."""
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return (hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git), git
