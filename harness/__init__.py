"""Test harness for nested virtualization on AMD (nSVM)."""
