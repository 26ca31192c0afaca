"""The model and a machine, side by side: the same operations, compared after every one.

`bench` is the machine (`code` its guest, `observe` what can be seen of it), `checker` compares,
`generator` makes sequences of operations from `boundaries`, `shrink` makes them small, `explain`
asks which knob would make the two agree, `record` writes a bundle that can be repeated anywhere.
`campaign` is the whole of it inside a host. What differs and has a name is in `deviations`, what
kernels complain of in `complaints`, what ends hosts in `hazards`.
"""
