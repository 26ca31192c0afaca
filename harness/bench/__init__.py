"""How fast the harness is, as a share of what C or a bare QEMU reaches in the same run."""
