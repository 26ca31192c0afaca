"""Traces recorded on emulated hosts: what trace_pipe said while EFER.SVME was set and cleared.

pages-K.txt has, for kernel K, in this order: a page fault's page, a slab page below a KVM ioctl,
the page of a vCPU, and the two blocks of nested state and their frees. pages-5.10-kretprobe.txt has
the latter four while return probes were armed too. functions-K.txt has the function events.
"""

from pathlib import Path

RECORDED = Path(__file__).parent / "recorded"
KERNELS = ("5.10", "6.1", "7.3")

#: The thread that was traced.
TIDS = {"5.10": 68, "6.1": 80, "7.3": 90}


def pages(kernel):
    return (RECORDED / f"pages-{kernel}.txt").read_text()


def functions(kernel):
    return (RECORDED / f"functions-{kernel}.txt").read_text()
