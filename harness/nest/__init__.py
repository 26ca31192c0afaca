"""Linux in Linux in Linux: every level boots the next one under the harness's own VMM.

`levels.descend` runs inside a host. It boots Linux there, whose initrd holds the very same code,
and calls itself in there, until the innermost Linux works and says what it saw.
"""
