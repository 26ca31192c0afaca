"""The userspace model of nested state: pure Python, no I/O. It predicts; it never touches a VM."""
