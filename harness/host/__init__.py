"""Hosts: where the code under test runs, and how work gets there and results come back."""
