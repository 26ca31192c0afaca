import pytest
from kvm_deadline import process_deadline

DEADLINE_S = 120


@pytest.fixture(autouse=True)
def deadline():
    with process_deadline(DEADLINE_S):
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A function that builds guest images into a cache of this test run."""
    from guest_images import ElfClass, build

    cache = tmp_path_factory.mktemp("images")

    def get(name, elf_class=ElfClass.ELF64):
        return build(name, elf_class, cache)

    return get
