"""Tampering with the SMRAM state save area, and with all else that RSM goes by.

A *cell* interrupts L1 or L2 by an SMI, changes something behind the handler's back, and executes
RSM. `table` declares all cells by group, `trial` runs one on a VM of its own beside the model,
`rows` is what came of it, `across` compares kernels.
"""
