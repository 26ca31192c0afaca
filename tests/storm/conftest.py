import pytest
from kvm_deadline import deadline_of_each

deadline = deadline_of_each(240)


@pytest.fixture(scope="session", autouse=True)
def images(carried_images):
    """Machines of proxies are made here."""
