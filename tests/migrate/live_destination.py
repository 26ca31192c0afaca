"""A process that receives one machine, says what it got, and runs it on.

Arguments: `unix PATH`, `tcp HOST` (says its port first) or `stdio FILE` (where it says things).
"""

import hashlib
import json
import sys
from pathlib import Path

from counting_guest import COUNTERS, resumed

from harness.migrate import live
from harness.migrate.connections import listen_tcp, listen_unix, standard_streams
from harness.migrate.fields import state_fields
from harness.migrate.state import capture
from kvm_ioctl.handles import Kvm


def receive(kvm, kind, place):
    if kind == "stdio":
        return live.receive(kvm, standard_streams())
    if kind == "unix":
        with listen_unix(place) as listener:
            return live.receive(kvm, listener.accept())
    with listen_tcp(place) as listener:
        print(listener.port, flush=True)
        return live.receive(kvm, listener.accept())


def main():
    kind, place = sys.argv[1:]
    with Kvm() as kvm:
        received = receive(kvm, kind, place)
        with received.machine as machine:
            slots = machine.memory.all_slots()
            said = {
                "state": state_fields(capture(machine)),
                "memory": {
                    str(int(s.gpa)): hashlib.sha256(s.backing[:]).hexdigest() for s in slots
                },
                "sides": received.sides,
                "before": [machine.memory.read_int(at, 4) for at in COUNTERS],
            }
            guest = resumed(machine)
            said["after"] = guest.stop()
    line = json.dumps(said)
    if kind == "stdio":
        Path(place).write_text(line)
    else:
        print(line, flush=True)


if __name__ == "__main__":
    main()
