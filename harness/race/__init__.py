"""Races for vmcb12 between VMRUN and another writer, to see whether KVM reads a field twice.

One vCPU executes VMRUN in a loop inside the guest; another one, or a thread of the host, rewrites
one field of vmcb12 while it does (`code`). `fields` says what is rewritten and what proves that two
parts of one VMRUN saw different values. Standard library only: it runs inside a host.
"""
