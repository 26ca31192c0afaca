"""Made-up machines for facts: good ones, but for what a test changes."""

from pathlib import Path

from harness.errors import HostError
from harness.facts import HostView
from harness.host.qemu import QEMU
from kvm_ioctl.capabilities import Cap


class FakeHost(HostView):
    """An AMD host on which everything is as it should be, but for what a test changes."""

    def __init__(self, **changes):
        self.flags = "svm npt vgif nrip_save"
        self.machine = "x86_64"
        self.params = {"nested": "1", "npt": "Y", "vgif": "1", "nrips": "1"}
        self.modules = ["kvm_amd"]
        self.errnos = {}
        self.api = 12
        self.caps = {Cap.KVM_CAP_NESTED_STATE: 4224, Cap.KVM_CAP_X86_SMM: 1}
        self.hierarchy = (Path("/cg"), 2)
        self.read_only = set()
        self.files = {
            "/cg/cgroup.subtree_control": "cpu memory\n",
            "/cg/memory.stat": "anon 1\nkernel 2\nkernel_stack 3\n",
            "/proc/self/mounts": "t /sys/kernel/tracing tracefs rw 0 0\n",
            "/proc/filesystems": "nodev\ttracefs\n",
        }
        for name, value in changes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    @property
    def cpu_flags(self):
        return frozenset(self.flags.split())

    @property
    def architecture(self):
        return self.machine

    def read(self, path):
        return self.files.get(str(path))

    def param(self, module, name):
        return self.params.get(name) if module == "kvm_amd" and module in self.modules else None

    def kvm_modules(self):
        return self.modules

    def open_errno(self, path, flags=0):
        return self.errnos.get(path, 0)

    def writable(self, path):
        return str(path) not in self.read_only

    def kvm_api_version(self):
        return self.api

    def check_extension(self, cap):
        return self.caps.get(cap, 0)

    def memory_hierarchy(self):
        return self.hierarchy


CGROUP_V1 = {"hierarchy": (Path("/cg"), 1), "files": {"/cg/memory.kmem.usage_in_bytes": "0\n"}}


class FakeTools:
    """A machine with all tools, but for what a test changes."""

    def __init__(self, **changes):
        self.python_version = (3, 12, 1)
        self.missing = ()
        self.qemu_answer = (0, "")
        self.build_error = ""
        self.kernels = ["6.1.0-56-amd64"]
        self.userland = True
        self.free_mib = 50_000
        self.memory_mib = 4_000
        for name, value in changes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def is_there(self, what):
        return what not in self.missing

    def run(self, command, text=""):
        assert command[0] == QEMU
        assert "enforce" in command[command.index("-cpu") + 1]
        return self.qemu_answer

    def qemu_version(self):
        return "7.2.22"

    def build_guest(self):
        if self.build_error:
            raise HostError(self.build_error)

    def cached_kernels(self):
        return self.kernels

    def has_cached_userland(self):
        return self.userland

    def cache_free_mib(self):
        return Path("/cache"), self.free_mib

    def memory_free_mib(self):
        return self.memory_mib
