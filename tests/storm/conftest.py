import pytest
from kvm_deadline import process_deadline

DEADLINE_S = 240


@pytest.fixture(autouse=True)
def deadline():
    with process_deadline(DEADLINE_S):
        yield


@pytest.fixture(scope="session", autouse=True)
def images(carried_images):
    """Machines of proxies are made here."""
