"""Receives one machine over a socket that it inherits, and says what it got.

``python -m harness.bench.migrate_destination FD``
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict

from harness.bench.migrate_links import thrown_away
from harness.migrate import live
from harness.migrate.connections import over_socket
from kvm_ioctl.handles import Kvm


def main() -> None:
    """Do it."""
    link = over_socket(socket.socket(fileno=int(sys.argv[1])), "the source")
    with Kvm() as kvm:
        print(json.dumps(asdict(thrown_away(live.receive(kvm, link)))), flush=True)


if __name__ == "__main__":
    main()
