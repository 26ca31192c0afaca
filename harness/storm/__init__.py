"""Machines at work that are moved again and again: between processes, kernels and hosts."""
