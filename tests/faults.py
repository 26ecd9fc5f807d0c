"""A proxy that stands in front of an S3 server and breaks what passes through it, request by request.

`plan` is asked for every request and names a fault, or none; `outage` takes the whole server away for some seconds.
`latency` and `bandwidth` make a server next door one that is far away.
"""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

CHUNK = 64 * 1024


@dataclass(frozen=True)
class Request:
    "What the plan is asked about"

    number: int  # from 0
    method: str
    path: str  # with the query
    size: int  # bytes of its body
    key: str = ""  # by which it is signed


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    answer  `status` and `body` in place of the server's answer
    reset   the connection is reset, and the server never sees the request
    cut     the connection is reset in the middle of the request's body
    lost    the server does what it was asked, and its answer never arrives
    half    half of the answer's body, then the connection is closed
    short   half of the answer's body, as if it were the whole
    hang    no answer for `seconds`, then a reset
    slow    the answer comes `seconds` late
    held    the answer comes once `until` is true
    """

    kind: str
    seconds: float = 0.0
    status: int = 503
    body: str = ""
    headers: str = ""
    act: Callable[[], None] = lambda: None  # called when a connection is reset
    until: Callable[[], bool] = lambda: True


def s3_error(status: int, code: str, message: str = "") -> Fault:
    "An answer such as S3 gives"
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Fault("answer", status=status, body=body)


SLOW_DOWN = s3_error(503, "SlowDown", "Please reduce your request rate")
INTERNAL = s3_error(500, "InternalError", "We encountered an internal error")
GATEWAY = Fault("answer", status=502, body="<html><h1>502 Bad Gateway</h1></html>")


class Proxy:
    "The proxy, on a loop and in a thread of its own; use it as a context manager"

    def __init__(self, upstream: str, plan: Callable[[Request], Fault | None] = lambda request: None):
        self.host, self.upstream_port, self.port = "127.0.0.1", urlsplit(upstream).port, 0
        self.plan, self.rate = plan, 0.0  # bytes per second of each connection and direction; 0: as fast as it goes
        self.latency, self.bandwidth = 0.0, 0.0  # seconds before each answer; bytes per second of all connections
        self.free = {"up": 0.0, "down": 0.0}  # when what the bandwidth has let through so far is through
        self.requests, self.faults, self.received, self.sent = [], [], 0, 0
        self.loop, self.server, self.open = asyncio.new_event_loop(), None, set()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> "Proxy":
        self.thread.start()
        self._run(self._up())
        return self

    def __exit__(self, *error) -> None:
        self._run(self._down())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    def down(self) -> None:
        "From now on, connections are reset, and new ones refused"
        self._run(self._down())

    def up(self) -> None:
        "As before"
        self._run(self._up())

    def outage(self, seconds: float) -> None:
        "Down for some seconds"
        self.down()
        self.loop.call_soon_threadsafe(self.loop.call_later, seconds, lambda: self.loop.create_task(self._up()))

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(600)

    async def _up(self):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)  # or `rate` is the kernel's, not ours
        listener.bind((self.host, self.port))
        self.server, self.port = await asyncio.start_server(self._serve, sock=listener), listener.getsockname()[1]

    async def _down(self):
        self.server.close()
        for writer in list(self.open):
            writer.transport.abort()

    async def _serve(self, reader, writer):
        self.open.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open.discard(writer)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _request(self, reader, writer) -> bool:
        "One request and its answer; False where the connection ends with it"
        head = await _head(reader)
        if not head:
            return False
        method, path, _ = head[0].decode().split(" ", 2)
        size = int(_header(head, b"content-length") or 0)
        signed = re.search(r"Credential=([^/]+)/", str(_header(head, b"authorization") or ""))
        request = Request(len(self.requests), method, path, size, signed[1] if signed else "")
        self.requests.append(request)
        fault = self.plan(request)
        if fault:
            self.faults.append(fault)
        if _header(head, b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = [line for line in head if not line.lower().startswith(b"expect:")]
        kind = fault.kind if fault else ""
        if kind == "reset":
            return self._reset(writer, fault)
        body = await self._receive(reader, size // 2 if kind == "cut" else size)
        if kind == "cut":
            return self._reset(writer, fault)
        if kind == "answer":
            text = fault.body.encode()
            lines = f"HTTP/1.1 {fault.status} X\r\nContent-Type: text/html\r\nContent-Length: {len(text)}\r\n"
            writer.write((lines + fault.headers + "\r\n").encode() + (b"" if method == "HEAD" else text))
            await writer.drain()
            return True
        if kind == "hang":
            await asyncio.sleep(fault.seconds)
            writer.transport.abort()
            return False
        while kind == "held" and not fault.until():
            await asyncio.sleep(0.005)
        await asyncio.sleep(self.latency + (fault.seconds if kind == "slow" else 0))
        return await self._forward(head, body, method, fault, writer)

    def _reset(self, writer, fault: Fault) -> bool:
        fault.act()
        writer.transport.abort()
        return False

    async def _forward(self, head, body, method, fault: Fault | None, writer) -> bool:
        kind = fault.kind if fault else ""
        up_reader, up_writer = await asyncio.open_connection(self.host, self.upstream_port, limit=1024 * 1024)
        self.open.add(up_writer)
        try:
            keep = [line for line in head if not line.lower().startswith(b"connection:")]
            up_writer.write(b"\r\n".join([*keep, b"Connection: close", b"", b""]) + body)
            answer = [line for line in await _head(up_reader) if not line.lower().startswith(b"connection:")]
            size = _header(answer, b"content-length")
            if kind == "short" and size is not None:
                size = str(int(size) // 2)
                answer = [line for line in answer if not line.lower().startswith(b"content-length:")]
                answer.append(f"Content-Length: {size}".encode())
            if kind == "lost":
                await up_reader.read()
                return self._reset(writer, fault)
            if size is None:  # chunked: the answer ends with the connection
                writer.write(b"\r\n".join([*answer, b"Connection: close", b"", b""]))
            else:
                writer.write(b"\r\n".join([*answer, b"", b""]))
            left = 0 if method == "HEAD" else 2**62 if size is None else int(size)
            left = left // 2 if kind == "half" and size is not None else left
            while left and (data := await up_reader.read(min(CHUNK, left))):
                writer.write(data)
                await writer.drain()
                await self._pace(len(data), "down")
                self.sent, left = self.sent + len(data), left - len(data)
            if kind == "half":
                writer.close()
            return size is not None and kind != "half"
        finally:
            self.open.discard(up_writer)
            up_writer.close()

    async def _receive(self, reader, size: int) -> bytes:
        parts = []
        while size:
            data = await reader.read(min(CHUNK, size))
            if not data:
                raise ConnectionResetError
            await self._pace(len(data), "up")
            parts.append(data)
            self.received, size = self.received + len(data), size - len(data)
        return b"".join(parts)

    async def _pace(self, count: int, way: str):
        if self.rate:
            await asyncio.sleep(count / self.rate)
        if self.bandwidth:
            now = self.loop.time()
            self.free[way] = max(self.free[way], now - 0.02) + count / self.bandwidth  # a sleep may last too long
            await asyncio.sleep(self.free[way] - now)


async def _head(reader) -> list[bytes]:
    "The lines of a request's or an answer's head; empty at the end of the connection"
    with contextlib.suppress(asyncio.IncompleteReadError):
        return (await reader.readuntil(b"\r\n\r\n")).rstrip(b"\r\n").split(b"\r\n")
    return []


def _header(head: list[bytes], name: bytes) -> str | None:
    return next(
        (line.partition(b":")[2].strip().decode() for line in head if line.lower().startswith(name + b":")), None
    )
