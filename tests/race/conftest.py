import pytest
from kvm_deadline import process_deadline

DEADLINE_S = 240


@pytest.fixture(autouse=True)
def deadline():
    with process_deadline(DEADLINE_S):
        yield
