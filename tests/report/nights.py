"""Results of made-up nights, written as runs write them."""

import json

EMULATED = {
    "kind": "emulated",
    "kernel_release": "6.1.0-56-amd64",
    "kernel_version": "#1 SMP Debian 6.1.192-2",
    "kernel_origin": "Debian linux-image-6.1.0-56-amd64 6.1.192-2",
    "module_parameters": {"kvm_amd.nested": "1", "kvm_amd.npt": "Y"},
    "silicon": "emulated (QEMU 7.2.22, TCG)",
}

#: What must never become markup, a script, or an end of the page.
HOSTILE = "</td></script><script>document.title='owned'</script><img src=x onerror=alert(1)>{{7*7}}"


def end(case, verdict="PASS", reason="", *, known="", host=EMULATED, repeat=1, **evidence):
    return {
        "event": "end", "case": case, "verdict": verdict, "reason": reason, "known": known,
        "repeat": repeat, "claim": f"Claim of {case}.", "seconds": 0.5, "host": host,
        "evidence": evidence,
    }  # fmt: skip


def begin(case, levels=2, repeat=1):
    return {"event": "begin", "case": case, "levels": levels, "repeat": repeat}


def note(case, what, **data):
    return {"event": "emit", "case": case, "kind": "note", "data": {"what": what, **data}}


def write_run(directory, events, *, at=1_000_000.0, finished=True, machine="lab1", argv=()):
    """Write a run's results.jsonl; return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    head = {
        "event": "run", "version": "0.1.0", "revision": "abc1234", "argv": ["run", *argv],
        "machine": {"name": machine, "cpu": "AMD"}, "choice": {"host": "emulated", "kernel": "6.1"},
    }  # fmt: skip
    tail = [{"event": "summary", "counts": {}, "seconds": 60.0, "complaints": []}]
    lines = [{"time": at, **event} for event in [head, *events, *(tail if finished else [])]]
    (directory / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def on(release):
    """Return a description of an emulated host with another kernel."""
    return {**EMULATED, "kernel_release": release}
