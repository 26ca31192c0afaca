"""`python -m guest_images`: build every guest, print hashes and paths."""

import sys

from guest_images.builder import build_all, image_hash
from harness.errors import HostError


def main() -> int:
    """Build all images; 1 with one line on stderr if one cannot be built."""
    try:
        images = build_all()
    except HostError as e:
        print(f"guest_images: {e}", file=sys.stderr)
        return 1
    for path in images.values():
        print(image_hash(path), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
