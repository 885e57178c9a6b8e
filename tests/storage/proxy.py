"""A fault proxy: stands between the store and the S3 server and does to single requests what networks do.

A `rule` looks at every request, counted from 1, and returns a fault or None. Requests are forwarded byte for byte in
what is signed, so the server behind checks real signatures.
"""

from __future__ import annotations

import http.client
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>made by the proxy</Message></Error>'


@dataclass(frozen=True)
class Request:
    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """What happens instead of a plain answer."""

    kind: str  # "answer", "reset", "stall", "lose_answer", "cut_answer", "do"
    status: int = 500
    code: str = "InternalError"
    action: Callable[[], None] = field(default=lambda: None)


Rule = Callable[[Request], "Fault | None"]


class FaultProxy:
    """Listens on a free port; `rule` may be changed at any time, `requests` keeps what came."""

    def __init__(self, upstream_port: int) -> None:
        self.rule: Rule = lambda request: None
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                proxy.serve(self, upstream_port)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self, rule: Rule = lambda request: None) -> None:
        """Count from 1 again with a new rule."""
        with self._lock:
            self.requests = []
            self.rule = rule

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: socketserver.StreamRequestHandler, upstream_port: int) -> None:
        try:
            while self._exchange(handler, upstream_port):
                pass
        except (ConnectionError, http.client.HTTPException):
            handler.connection.close()

    def _exchange(self, handler: socketserver.StreamRequestHandler, upstream_port: int) -> bool:
        request = self._read(handler)
        if request is None:
            return False
        fault = self.rule(request)
        if fault is None:
            handler.wfile.write(forward(request, upstream_port))
            return True
        if fault.kind == "do":
            fault.action()
            handler.wfile.write(forward(request, upstream_port))
            return True
        if fault.kind == "answer":
            body = ERROR.format(code=fault.code).encode() if request.method != "HEAD" else b""
            head = (
                f"HTTP/1.1 {fault.status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            handler.wfile.write(head.encode() + body)
            return True
        if fault.kind == "stall":
            self.closing.wait(60)
        if fault.kind in ("lose_answer", "cut_answer"):
            answer = forward(request, upstream_port)
            if fault.kind == "cut_answer":
                handler.wfile.write(answer[:-1])
        _reset(handler.connection)
        return False

    def _read(self, handler: socketserver.StreamRequestHandler) -> Request | None:
        line = handler.rfile.readline().decode()
        if not line.strip():
            return None
        method, path, _ = line.split(" ", 2)
        headers = {}
        while header := handler.rfile.readline().decode().strip():
            name, _, value = header.partition(":")
            headers[name.strip()] = value.strip()
        lower = {name.lower(): value for name, value in headers.items()}
        if "expect" in lower:
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            headers = {name: value for name, value in headers.items() if name.lower() != "expect"}
        body = handler.rfile.read(int(lower.get("content-length", 0)))
        with self._lock:
            request = Request(len(self.requests) + 1, method, path, headers, body)
            self.requests.append(request)
        return request


def forward(request: Request, port: int) -> bytes:
    """Send a request to the server and return its answer as bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers.items():
        connection.putheader(name, value)
    connection.endheaders(request.body)
    answer = connection.getresponse()
    body = answer.read()
    skipped = {"transfer-encoding", "connection"} | (set() if request.method == "HEAD" else {"content-length"})
    lines = [f"{name}: {value}" for name, value in answer.getheaders() if name.lower() not in skipped]
    if request.method != "HEAD":
        lines.append(f"Content-Length: {len(body)}")
    connection.close()
    head = "\r\n".join([f"HTTP/1.1 {answer.status} {answer.reason}", *lines])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def _reset(connection: socket.socket) -> None:
    """End a connection with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
