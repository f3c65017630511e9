"""What may stand between kaged and PostgreSQL: a line that is cut, a pooler that rewrites, one that tells secrets.

Each listens on a socket of its own, and its `url` leads there.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from psycopg2.extensions import parse_dsn

PORT = 5432
STARTUP = 196608  # protocol 3.0; SSL, GSS and cancel requests have other numbers here


class Listener:
    """Accepts connections on a socket in `directory`; each is served in a thread until it ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sockets: list[socket.socket] = []
        self._guard = threading.Lock()
        self.refusing = False

    def __enter__(self) -> Self:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.directory / f".s.PGSQL.{PORT}"))
        self._listening.listen(20)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def cut(self) -> None:
        """End every connection at once, on both sides."""
        with self._guard:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def keep(self, one: socket.socket) -> None:
        with self._guard:
            self._sockets.append(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            self.keep(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self.serve(client)


class Proxy(Listener):
    """Passes everything on to the server of `url`; `startup` and `answer` may rewrite what they are shown."""

    def __init__(
        self,
        directory: Path,
        url: str,
        *,
        startup: Callable[[dict[str, str]], None] = lambda parameters: None,
        answer: Callable[[bytes, bytes], bytes] | None = None,
    ) -> None:
        super().__init__(directory)
        self._target = parse_dsn(url)
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query)) | {"host": str(directory), "port": str(PORT)}
        self.url = f"postgresql://{self._target['user']}@/{self._target['dbname']}?{urlencode(query)}"
        self._startup = startup
        self._answer = answer

    def serve(self, client: socket.socket) -> None:
        host, port = self._target["host"], int(self._target.get("port", PORT))
        server = socket.socket(socket.AF_UNIX if host.startswith("/") else socket.AF_INET)
        with server:
            server.connect(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port))
            self.keep(server)
            server.sendall(self._read_startup(client))
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            self._pump(server, client, self._answer)

    def _read_startup(self, client: socket.socket) -> bytes:
        (size,) = struct.unpack("!i", receive(client, 4))
        body = receive(client, size - 4)
        (version,) = struct.unpack("!i", body[:4])
        if version != STARTUP:
            return struct.pack("!i", size) + body
        words = body[4:].decode().split("\0")
        parameters = dict(zip(words[::2], words[1::2], strict=False))
        parameters.pop("", None)
        self._startup(parameters)
        text = "".join(f"{name}\0{value}\0" for name, value in parameters.items()) + "\0"
        return struct.pack("!ii", len(text.encode()) + 8, STARTUP) + text.encode()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, rewrite: Callable[[bytes, bytes], bytes] | None) -> None:
        with contextlib.suppress(OSError):
            for piece in pieces(source, rewrite):
                target.sendall(piece)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def pieces(source: socket.socket, rewrite: Callable[[bytes, bytes], bytes] | None) -> Iterator[bytes]:
    if rewrite is None:
        while data := source.recv(65536):
            yield data
        return
    while True:
        head = receive(source, 5)
        kind, (size,) = head[:1], struct.unpack("!i", head[1:])
        yield message(kind, rewrite(kind, receive(source, size - 4)))


class Talker(Listener):
    """A server that asks for the password in clear, and refuses with what `refuse` makes of it."""

    def __init__(self, directory: Path, refuse: Callable[[str], str]) -> None:
        super().__init__(directory)
        self._refuse = refuse

    def serve(self, client: socket.socket) -> None:
        (size,) = struct.unpack("!i", receive(client, 4))
        receive(client, size - 4)
        client.sendall(message(b"R", struct.pack("!i", 3)))
        head = receive(client, 5)
        password = receive(client, struct.unpack("!i", head[1:])[0] - 4).rstrip(b"\0").decode()
        fields = {"S": "FATAL", "V": "FATAL", "C": "28P01", "M": self._refuse(password)}
        body = b"".join(name.encode() + text.encode() + b"\0" for name, text in fields.items())
        client.sendall(message(b"E", body + b"\0"))


def receive(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body
