"""Probes: what the kernel really did, measured from outside KVM. Standard library only."""
