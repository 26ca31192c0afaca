"""Which behaviours the running kernel has: one experiment for each knob of `harness.model.knobs`.

`battery.identify` runs them all on an open /dev/kvm, each in a process and a VM of its own, and
returns a `report.Report`; `nearest` compares that with the named settings.
"""
