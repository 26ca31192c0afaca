"""Freestanding guests, compiled from C and assembly into the user's cache."""

from guest_images.builder import ElfClass, ImageBuildError, build, build_all, guest_names

__all__ = ["ElfClass", "ImageBuildError", "build", "build_all", "guest_names"]
