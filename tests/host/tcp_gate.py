"""A way to a TCP port of this machine that can be cut, and opened again."""

import contextlib
import select
import socket
import threading


class Gate:
    """A context manager; `port` is the way in."""

    def __init__(self, port):
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs, self._lock = [], threading.Lock()
        self._shut = self._closing = False
        #: How many connections did not come through.
        self.refused = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._closing = True
        self._thread.join(10)
        self.cut()
        self._listener.close()

    def cut(self, *, shut=False):
        """End all connections; `shut`: let no new one through until `open`."""
        with self._lock:
            self._shut = shut
            for pair in self._pairs:
                for end in pair:
                    end.close()
            self._pairs.clear()

    def open(self):
        self._shut = False

    def _run(self):
        while not self._closing:
            with self._lock, contextlib.suppress(OSError):
                self._turn()

    def _turn(self):
        ends = [end for pair in self._pairs for end in pair]
        for ready in select.select([self._listener, *ends], [], [], 0.02)[0]:
            if ready is self._listener:
                self._accept()
            else:
                self._pass_on(ready)

    def _accept(self):
        inner, _ = self._listener.accept()
        if self._shut:
            inner.close()
            self.refused += 1
            return
        self._pairs.append((inner, socket.create_connection(("127.0.0.1", self._to), timeout=5)))

    def _pass_on(self, ready):
        for pair in self._pairs:
            if ready in pair:
                data = ready.recv(1 << 16)
                other = pair[1 - pair.index(ready)]
                if data:
                    other.sendall(data)
                    return
                self._pairs.remove(pair)
                for end in pair:
                    end.close()
                return
