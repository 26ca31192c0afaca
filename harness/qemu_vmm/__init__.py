"""QEMU as the VMM of a Linux guest, inside a host: started, watched, migrated to another QEMU.

Most people meet nested virtualization through QEMU. What it runs here is the same Linux, with the
same agent on its second serial port, as the harness's own VMM does (`harness.nest.qemu_guest` makes
it a guest like any other); what differs is who calls KVM.

`installation` finds QEMU: the host's own, or what an emulated host has on a disk. `process` is one
QEMU, `migration` the way from one to the next, `pc` the guest that goes it. Its `channel` and
`console` (read by pexpect) outlive every QEMU. QMP is qemu.qmp's.
"""
