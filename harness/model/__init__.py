"""The userspace model of nested state: pure Python, no I/O. It predicts; it never touches a VM.

`Model` (model.py) takes operations (operations.py) and gives outcomes, as a kernel with certain
`Knobs` (knobs.py) on a certain CPU (facts.py) would. Beneath it, from the outside in: KVM_RUN
(run.py) and instructions (instructions.py); the two ioctls of nested state (nested_state.py); VMRUN
(vmrun.py) and its checks (checks.py), #VMEXIT (vmexit.py), SMM (smm.py, save_area.py), forced leave
(leave.py), EFER (efer.py) and allocation (allocation.py); the state of it all (state.py), the
guest's memory (memory.py, areas.py) and what lies where in it (layout.py). `seen` says what can be
observed, `apm` what the manual says, `unreachable` what no operation shows.
"""
