"""A QEMU that is none: it serves the agent on the channel, on this machine, without any KVM.

Files beside it tell it what to do: `mode` is what becomes of a machine that starts, `agent_dir`
where the agent is, `params` the parameters that kvm_amd has in it. It writes the command lines that
it was given to `command`.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def chardev(name):
    """Return a chardev's options from the command line."""
    [options] = [a for a in sys.argv if f"id={name}," in a]
    return dict(pair.split("=", 1) for pair in options.split(",") if "=" in pair)


def main():
    """Be what `mode` says."""
    mode = (HERE / "mode").read_text().strip()
    if "--version" in sys.argv:
        print("QEMU emulator version 9.9.9 (forged)")
        return
    with open(HERE / "command", "a") as file:
        file.write("\0".join(sys.argv) + "\n")
    with open(chardev("console")["path"], "w", buffering=1) as console:
        console.write("booting\n")
        if mode == "panics":
            console.write("Kernel panic - not syncing: forged\nlast line\n")
            return
    if mode == "refuses":
        print("qemu: first line\nqemu: no such machine", file=sys.stderr)
        sys.exit(1)
    sys.path.insert(0, (HERE / "agent_dir").read_text())
    import agent

    agent._BUNDLES = HERE / "bundles"
    said = agent.hello()
    params = json.loads((HERE / "params").read_text())
    said["params"] = {f"kvm_amd.{name}": value for name, value in params.items()}
    agent.hello = lambda: said
    fd = int(chardev("channel")["fd"])
    agent.serve(fd, fd)


main()
