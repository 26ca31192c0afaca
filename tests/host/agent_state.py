"""State of a module, to see whether a call's changes stay in its own process."""

import os

calls = 0
imported_by = os.getpid()
