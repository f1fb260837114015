"""An HTTP server on loopback that answers as the web does at its worst: the kind of answer is the path's first part.

In a thread of a test: `with HostileServer() as server: server.url("reset", 3)`. In a process of its own, for
benchmarks: `python -m tests.support.hostile_server`, which prints its port and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import ssl
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

PICTURES = 16
"""Different ones; a path's number chooses."""
DRIP_S = 0.1
CHUNK = bytes(64 << 10)


def pictures(count: int = PICTURES, *, side: int = 64, seed: int = 0) -> list[bytes]:
    """JPEGs of smooth noise: about 1.5 kB at 64 pixels, 20 to 60 kB at 512."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=int(chance.integers(70, 90)))
        made.append(file.getvalue())
    return made


def picture_kinds() -> dict[str, bytes]:
    image = Image.new("RGB", (20, 10), "red")
    made = {}
    for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        file = io.BytesIO()
        image.save(file, kind)
        made[kind] = file.getvalue()
    return made


def png_bomb(width: int = 100_000, height: int = 100_000) -> bytes:
    """A header that declares so many pixels."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0) + bytes(40)


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class _Peer(asyncio.Protocol):
    def __init__(self, server: HostileServer) -> None:
        self._server = server
        self._received = b""
        self.open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._server.connections += 1
        self._server.open += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._server.open -= 1

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"\x16\x03"):
            # The first word of TLS, which nobody speaks here.
            self.transport.write(answer(b"", status="400 Plain"))
            self.transport.close()
            return
        self._received += data
        while b"\r\n\r\n" in self._received:
            request, _, self._received = self._received.partition(b"\r\n\r\n")
            self._server.serve(self, request.split(b" ", 2)[1].decode())

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, lambda: act() if self.open else None)


class HostileServer:
    """hits counts requests by path; `to` answers lead to `targets`, by name. hosts: addresses of 127.0.0.0/8.

    tls: speaks https with it.
    """

    def __init__(self, *, side: int = 64, hosts: int = 1, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.hits: Counter[str] = Counter()
        self.connections = self.open = 0
        """Ever made, and open now."""
        self.targets: dict[str, str] = {}
        self.hosts = [f"127.0.0.{number}" for number in range(1, hosts + 1)]
        self.pictures = pictures(side=side)
        self.kinds = picture_kinds()
        self._ok = [answer(one, "Content-Type: image/jpeg") for one in self.pictures]
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def url(self, kind: str, number: int | str = 0) -> str:
        host = self.hosts[number % len(self.hosts)] if isinstance(number, int) else self.hosts[0]
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}/{kind}/{number}"

    def __enter__(self) -> HostileServer:
        self._thread.start()
        self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._drips: set[asyncio.Task[None]] = set()
        self.port = 0
        servers = []
        for host in self.hosts:
            servers.append(
                await self._loop.create_server(lambda: _Peer(self), host, self.port, backlog=1024, ssl=self._tls)
            )
            self.port = servers[0].sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        for task in self._drips:
            task.cancel()
        for server in servers:
            server.close()

    def serve(self, peer: _Peer, path: str) -> None:
        self.hits[path] += 1
        _, kind, number = [*path.partition("?")[0].split("/", 2), "", ""][:3]
        # The usual case, as fast as may be: benchmarks measure the other side.
        if kind == "ok":
            peer.transport.write(self._ok[int(number or 0) % PICTURES])
        else:
            getattr(self, f"_{kind}")(peer, number, self.hits[path])

    # One method for each kind: (who asks, the rest of the path, how often this path was asked for)

    def _kind(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(self.kinds[number]))

    def _silent(self, peer: _Peer, number: str, _: int) -> None:
        pass

    def _reset(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.abort()

    def _short(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(self._ok[0][:-200])
        peer.transport.close()

    def _status(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(b"no", status=f"{number.split('/')[0]} So"))

    def _limited(self, peer: _Peer, number: str, asked: int) -> None:
        """429 once, with a wait that `number` names; then the picture."""
        if asked == 1:
            peer.transport.write(answer(b"", f"Retry-After: {number.split('/')[0]}", status="429 Too Many"))
        else:
            peer.transport.write(self._ok[0])

    def _flaky(self, peer: _Peer, number: str, asked: int) -> None:
        peer.transport.write(answer(b"", status="500 Oh") if asked == 1 else self._ok[0])

    def _to(self, peer: _Peer, number: str, _: int) -> None:
        """A redirect to the target that the first part of `number` names."""
        peer.transport.write(answer(b"", f"Location: {self.targets[number.split('/')[0]]}", status="302 Found"))

    def _hop(self, peer: _Peer, number: str, _: int) -> None:
        """So many redirects, one behind the other, to a picture."""
        left = int(number)
        target = f"/hop/{left - 1}" if left > 1 else "/ok/1"
        peer.transport.write(answer(b"", f"Location: {target}", status="301 Moved"))

    def _circle(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(b"", f"Location: /circle/{1 - int(number)}", status="302 Found"))

    def _nowhere(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(b"", "Location: file:///etc/passwd", status="302 Found"))

    def _gzip(self, peer: _Peer, number: str, _: int) -> None:
        """10 MB of zeros in 10 kB."""
        peer.transport.write(answer(gzip.compress(bytes(10 << 20)), "Content-Encoding: gzip"))

    def _huge(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + self.pictures[0])

    def _endless(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(b"HTTP/1.1 200 OK\r\n\r\n" + self.pictures[0])
        self._forever(peer, lambda: CHUNK, 0)

    def _promise(self, peer: _Peer, number: str, _: int) -> None:
        """900 kB are announced, and nothing comes."""
        peer.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n\xff\xd8")

    def _drip(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        self._forever(peer, lambda: b"\xff", DRIP_S)

    def _drip_header(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(b"HTTP/1.1 200 OK\r\nX: ")
        self._forever(peer, lambda: b"x", DRIP_S)

    def _bomb(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(png_bomb(), "Content-Type: image/png"))

    def _html(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(b"<!doctype html><title>Sorry</title>" * 20, "Content-Type: image/jpeg"))

    def _empty(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(answer(b""))

    def _garbage(self, peer: _Peer, number: str, _: int) -> None:
        peer.transport.write(b"\x00\x01 this is no HTTP at all\r\n\r\n")
        peer.transport.close()

    def _robots(self, peer: _Peer, number: str, _: int) -> None:
        """X-Robots-Tag with the rest of the path as its value."""
        peer.transport.write(answer(self.pictures[0], f"X-Robots-Tag: {number.replace('%20', ' ')}"))

    def _chunked(self, peer: _Peer, number: str, _: int) -> None:
        self._in_pieces(peer, self.pictures[int(number) % PICTURES], 400)

    def _known(self, peer: _Peer, number: str, _: int) -> None:
        """So many bytes, and their number before them."""
        peer.transport.write(answer(self.pictures[0].ljust(int(number), b"\0")))

    def _large(self, peer: _Peer, number: str, _: int) -> None:
        """400 kB of unknown length."""
        self._in_pieces(peer, self.pictures[0].ljust(400_000, b"\0"), 16 << 10)

    def _in_pieces(self, peer: _Peer, body: bytes, size: int) -> None:
        pieces = b"".join(
            b"%x\r\n%b\r\n" % (len(body[at : at + size]), body[at : at + size]) for at in range(0, len(body), size)
        )
        peer.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")

    def _headers(self, peer: _Peer, number: str, _: int) -> None:
        """A header that does not end."""
        peer.transport.write(b"HTTP/1.1 200 OK\r\n")
        self._forever(peer, lambda: b"X-Long: " + b"y" * 1000 + b"\r\n", 0)

    def _slow(self, peer: _Peer, number: str, _: int) -> None:
        """The picture after a fiftieth of a second."""
        peer.later(0.02, lambda: peer.transport.write(self._ok[int(number) % PICTURES]))

    def _forever(self, peer: _Peer, piece: Callable[[], bytes], every_s: float) -> None:
        async def send() -> None:
            while peer.open:
                if peer.transport.get_write_buffer_size() < 1 << 20:
                    peer.transport.write(piece())
                await asyncio.sleep(every_s or 0.001)

        task = asyncio.get_running_loop().create_task(send())
        self._drips.add(task)
        task.add_done_callback(self._drips.discard)


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    with HostileServer(side=side) as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
