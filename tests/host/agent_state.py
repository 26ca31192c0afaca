"""State of a module, to see whether a call's changes stay in its own process."""

calls = 0
