"""A TCP proxy in front of a real server, at which something happens after a number of bytes.

So that an upload is interrupted in its middle at each run of a test, and not where a sleep happens
to end.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CHUNK = 16_384


class CuttingProxy:
    """Passes bytes on between clients and a port of loopback, until it is told to cut.

    Args:
        target: Port of the real server; may change between two connections.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.triggered = threading.Event()
        self.passed = {"upload": 0, "download": 0}  # bytes, of all connections
        self._lock = threading.Lock()
        self._left: int | None = None
        self._counts_up = True
        self._action: Callable[[], object] | None = None
        self._once = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        """Where clients find the server now."""
        return f"http://127.0.0.1:{self.port}"

    def arm(
        self,
        after: int,
        *,
        upload: bool,
        action: Callable[[], object] | None = None,
        once: bool = False,
    ) -> None:
        """Pass on ``after`` more bytes, do ``action`` once, then cut all connections, new ones too.

        ``triggered`` is set when the action is over, which may be after the client has failed: wait
        for it.

        Args:
            after: Bytes of all connections together.
            upload: Count what clients send, or else what they receive.
            action: Such as killing the server; nothing by default.
            once: New connections are passed on again.
        """
        with self._lock:
            self.triggered.clear()
            self._left, self._counts_up, self._action, self._once = after, upload, action, once

    def mend(self) -> None:
        """Pass everything on again."""
        with self._lock:
            self.triggered.clear()
            self._left = None

    def serve(self) -> None:
        """Accept connections until ``close``."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._connect, client)

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut()
        for thread in self._threads:
            thread.join()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            thread.start()
            self._threads.append(thread)

    def _connect(self, client: socket.socket) -> None:
        with self._lock:
            self._open.add(client)
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            self._close(client)
            return
        with self._lock:
            self._open.add(server)
        if self.triggered.is_set() and not self._once:
            self._close(client, server)
            return
        self._start(self._pump, server, client, False)
        self._pump(client, server, True)

    def _pump(self, source: socket.socket, sink: socket.socket, upload: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                passed, now = self._allowed(len(data), upload)
                sink.sendall(data[:passed])
                if now:
                    if self._action:
                        self._action()
                    self.triggered.set()
                    self._cut()
        self._close(source, sink)

    def _allowed(self, size: int, upload: bool) -> tuple[int, bool]:
        """How many bytes may pass, and whether this is the moment."""
        with self._lock:
            self.passed["upload" if upload else "download"] += size
            if (
                self._left is None
                or upload != self._counts_up
                or (self._once and self.triggered.is_set())
            ):
                return (0, False) if self.triggered.is_set() and not self._once else (size, False)
            before, self._left = self._left, max(self._left - size, 0)
            return min(size, before), size >= before > 0

    def _cut(self) -> None:
        with self._lock:
            everybody = list(self._open)
        self._close(*everybody)

    def _close(self, *sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it; close alone does not
            one.close()
            with self._lock:
                self._open.discard(one)


@contextmanager
def cutting_proxy(target: int) -> Iterator[CuttingProxy]:
    """A proxy that runs."""
    proxy = CuttingProxy(target)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
