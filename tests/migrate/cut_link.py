"""A link that is cut after so many bytes."""

import socket

from harness.migrate.links import FdLink


class CutLink(FdLink):
    """One end of a socket pair; what was sent before the cut arrives, nothing after it does."""

    def __init__(self, sock, *, sends=None, receives=None, on_cut=None):
        super().__init__(sock.fileno(), sock.fileno(), "the other end", sock.close)
        self._socket = sock
        self._sends, self._receives = sends, receives
        self._on_cut = on_cut or (lambda: sock.shutdown(socket.SHUT_RDWR))
        self._was_cut = False

    def write_all(self, pieces):
        data = b"".join(pieces)
        if self._sends is not None and self.sent_bytes + len(data) > self._sends:
            super().write_all([memoryview(data)[: self._sends - self.sent_bytes]])
            self._cut()
            if self._socket.fileno() >= 0:
                super().write_all([memoryview(data)[-1:]])
            return
        super().write_all([data])

    def read(self, size):
        if self._receives is not None:
            left = self._receives - self.received_bytes
            if left <= 0:
                # What is in the socket already could still be read.
                self._cut()
                raise self.lost("it was cut")
            size = min(size, left)
        return super().read(size)

    def _cut(self):
        if not self._was_cut:
            self._was_cut = True
            self._on_cut()


def pair_cut(*, sends=None, receives=None, on_cut=None):
    """The source's end, which is cut, and the destination's."""
    ours, theirs = socket.socketpair()
    source = CutLink(ours, sends=sends, receives=receives, on_cut=on_cut)
    return source, FdLink(theirs.fileno(), theirs.fileno(), "the source", theirs.close)
