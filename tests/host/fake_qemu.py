"""A QEMU that is none: it serves the agent on the channel, on this machine, without any KVM.

Run as `fake_qemu.py OPTIONS...`; its behaviour is in files beside it, of which the first argument of
none knows: `mode` says what becomes of a machine that starts.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def chardev(name):
    """Return a chardev's options from the command line."""
    [options] = [a for a in sys.argv if f"id={name}," in a]
    return dict(pair.split("=", 1) for pair in options.split(",") if "=" in pair)


def main():
    mode = (HERE / "mode").read_text().strip()
    if "--version" in sys.argv:
        print("QEMU emulator version 9.9.9 (forged)")
        return
    with open(HERE / "command", "a") as file:
        file.write("\0".join(sys.argv) + "\n")
    console = open(chardev("console")["path"], "w", buffering=1)
    fd = int(chardev("channel")["fd"])
    if mode == "refuses":
        print("qemu: first line\nqemu: no such machine", file=sys.stderr)
        sys.exit(1)
    if mode == "panics":
        console.write("booting\nKernel panic - not syncing: forged\nlast line\n")
        sys.exit(0)
    console.write("booting\n")
    sys.path.insert(0, (HERE / "agent_dir").read_text())
    import agent

    agent._BUNDLES = HERE / "bundles"
    agent.serve(fd, fd)


main()
