import pytest
from kvm_deadline import process_deadline

DEADLINE_S = 240


@pytest.fixture(autouse=True)
def deadline():
    with process_deadline(DEADLINE_S):
        yield


@pytest.fixture(scope="session", autouse=True)
def images():
    """Have the guest images where `load_image` finds them."""
    import guest_images

    directory = next(iter(guest_images.build_all().values())).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSVM_IMAGES", str(directory))
        yield directory
