"""An HTTP/1.1 proxy that breaks what passes through it, for tests against a real S3 server. Standard library only.

Bytes are passed on untouched, so signatures still hold. Each request is met by the first rule that matches "METHOD path" and has a count left.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["503", "500", "reset", "reset_body", "truncate", "corrupt", "slow", "stall", "hang", "reset_upload"]


@dataclass
class Rule:
    """A fault and the requests that it meets."""

    match: str
    """Regular expression, searched in "GET /bucket/key"."""
    kind: Kind
    """503 and 500: such an answer. reset: TCP reset before any answer; reset_body: within the body. truncate: the connection ends within the body.
    corrupt: one byte of the body is flipped. slow: ``bytes_per_s``. stall: silence within the body; hang: instead of an answer.
    reset_upload: TCP reset within the request's body."""
    count: int = 1
    """Requests that are met; -1: all."""
    after: int = 100
    """Bytes of the body that come before the fault."""
    bytes_per_s: int = 20_000


@dataclass
class FaultProxy:
    """A running proxy. ``rules`` may be replaced at any time."""

    upstream: tuple[str, int]
    endpoint: str = ""
    rules: list[Rule] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Every request that came, as "METHOD path"."""
    answered: int = 0
    """Bytes of all answers' bodies."""
    injected: list[tuple[str, str]] = field(default_factory=list)
    """Kind and request of every fault that was injected."""

    def rule(self, line: str) -> Rule | None:
        self.requests.append(line)
        for rule in self.rules:
            if rule.count and re.search(rule.match, line):
                rule.count -= 1
                self.injected.append((rule.kind, line))
                return rule
        return None


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy on loopback in front of an endpoint such as http://127.0.0.1:8333, in a thread of its own."""
    parts = urlsplit(upstream)
    proxy = FaultProxy((str(parts.hostname), int(parts.port or 80)))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault proxy", daemon=True)
    thread.start()
    start = asyncio.start_server(lambda reader, writer: _serve(proxy, reader, writer), "127.0.0.1", 0, limit=1 << 20)
    server = asyncio.run_coroutine_threadsafe(start, loop).result()
    proxy.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _serve(proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    upstream: asyncio.StreamWriter | None = None
    with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
        answers, upstream = await asyncio.open_connection(*proxy.upstream)
        while await _exchange(proxy, reader, writer, answers, upstream):
            pass
    for each in (upstream, writer):
        if each is not None:
            each.close()


async def _exchange(
    proxy: FaultProxy,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answers: asyncio.StreamReader,
    upstream: asyncio.StreamWriter,
) -> bool:
    """One request and its answer; whether the connection goes on."""
    head, line, fields = await _head(reader)
    rule = proxy.rule(line.rsplit(" ", 1)[0]) or Rule("", "slow", bytes_per_s=0)
    if rule.kind == "reset":
        return _reset(writer)
    if rule.kind == "hang":
        await asyncio.sleep(3600)
    if rule.kind in ("500", "503"):
        return await _refuse(writer, rule.kind, with_body=not line.startswith("HEAD"))
    upstream.write(head)
    if "100-continue" in fields.get("expect", "").lower():
        interim, status, found = await _head(answers)
        writer.write(interim)
        if " 100" not in status:
            await _body(answers, writer, found, None)
            return False
    if not await _body(reader, upstream, fields, rule if rule.kind == "reset_upload" else None):
        _reset(upstream)
        return _reset(writer)
    while True:
        answer, status, found = await _head(answers)
        writer.write(answer)
        if " 100 " not in status:
            break
    proxy.answered += 0 if line.startswith("HEAD") else int(found.get("content-length", 0))
    empty = line.startswith("HEAD") or " 204" in status or " 304" in status
    if not empty and not await _body(answers, writer, found, rule):
        if rule.kind == "reset_body":
            await asyncio.sleep(0.05)  # for what was sent to arrive before the reset
            return _reset(writer)
        return False
    return "close" not in (found.get("connection", "").lower(), fields.get("connection", "").lower())


async def _head(reader: asyncio.StreamReader) -> tuple[bytes, str, dict[str, str]]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return head, lines[0], fields


async def _refuse(writer: asyncio.StreamWriter, status: str, with_body: bool) -> bool:
    code = "SlowDown" if status == "503" else "InternalError"
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + (body if with_body else b""))
    await writer.drain()
    return False


def _reset(writer: asyncio.StreamWriter) -> bool:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


async def _body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: dict[str, str], rule: Rule | None) -> bool:
    """Pass a message's body on; False where a fault cut it short."""
    sent = 0
    async for data in _pieces(reader, fields, 1024 if rule and rule.bytes_per_s and rule.kind == "slow" else 1 << 16):
        piece = data
        reached = rule is not None and sent <= rule.after < sent + len(piece)
        if rule is not None and reached and rule.kind in ("reset_body", "truncate", "reset_upload", "stall"):
            writer.write(piece[: rule.after - sent])
            await writer.drain()
            if rule.kind == "stall":
                await asyncio.sleep(3600)
            return False
        if rule is not None and reached and rule.kind == "corrupt":
            at = rule.after - sent
            piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
        writer.write(piece)
        await writer.drain()
        sent += len(piece)
        if rule is not None and rule.kind == "slow" and rule.bytes_per_s:
            await asyncio.sleep(len(piece) / rule.bytes_per_s)
    return True


async def _pieces(reader: asyncio.StreamReader, fields: dict[str, str], step: int) -> AsyncIterator[bytes]:
    if "chunked" in fields.get("transfer-encoding", ""):
        while True:
            size = await reader.readline()
            length = int(size.split(b";")[0], 16)
            yield size + await reader.readexactly(length + 2)
            if not length:
                return
    left = int(fields.get("content-length", 0))
    while left:
        piece = await reader.read(min(step, left))
        if not piece:
            raise ConnectionError
        left -= len(piece)
        yield piece
