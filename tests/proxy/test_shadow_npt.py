import pytest

from harness.machine.addresses import Gpa
from harness.proxy.paging import LARGE_PAGE, PageTables, Pte, translate
from harness.proxy.shadow_npt import Outcome, ShadowNpt
from harness.svm.exit_info import NpfInfo

READ, WRITE, FETCH = NpfInfo.of(US=1), NpfInfo.of(US=1, RW=1), NpfInfo.of(US=1, ID=1)
FINAL = 1 << 32


@pytest.fixture
def guest(memory, pages):
    made = PageTables(memory, pages)
    made.identity(0, 2 * LARGE_PAGE)
    return made


@pytest.fixture
def changes():
    return []


@pytest.fixture
def shadow(memory, pages, guest, changes):
    made = ShadowNpt(memory, pages, lambda: changes.append(1))
    made.refresh(guest.root)
    return made


def same(address):
    return address


def shifted(address):
    return address + LARGE_PAGE


def test_a_fill_composes_both_translations(memory, shadow):
    assert shadow.fault(0x5123, READ, same, shifted) == (Outcome.FILLED, READ)
    assert translate(memory, shadow.root, 0x5123)[0] == LARGE_PAGE + 0x5123
    # One large page in both: filled as a whole.
    assert translate(memory, shadow.root, LARGE_PAGE - 1)[0] == 2 * LARGE_PAGE - 1


def test_a_small_page_of_the_host_is_filled_alone(memory, shadow):
    def host(address):
        return address if address < 0x6000 else None

    assert shadow.fault(0x5000, READ, same, host)[0] is Outcome.FILLED
    assert translate(memory, shadow.root, 0x5000)[0] == 0x5000
    assert translate(memory, shadow.root, 0x6000) is None


@pytest.mark.parametrize("access", [READ, WRITE, FETCH])
def test_absent_in_the_guests_tables_is_the_guests_fault(guest, shadow, access):
    guest.unmap(0x5000)
    outcome = shadow.fault(0x5000, access | FINAL, same, same)
    assert outcome == (Outcome.GUEST, access | FINAL)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"clear": Pte.W}, WRITE),
        ({"set_": Pte.NX}, FETCH),
        ({"clear": Pte.U}, READ),
    ],
)
def test_permissions_of_the_guests_tables_hold(memory, guest, shadow, change, refused):
    guest.protect(0x5000, **change)
    outcome = shadow.fault(0x5000, refused | FINAL, same, same)
    assert outcome == (Outcome.GUEST, refused | FINAL | NpfInfo.P.mask)
    if refused is not READ:
        assert shadow.fault(0x5000, READ, same, same)[0] is Outcome.FILLED
        assert bool(translate(memory, shadow.root, 0x5000)[1] & Pte.W) == (refused is not WRITE)


def test_absent_in_the_hosts_tables_is_the_hosts(shadow):
    assert shadow.fault(0x5000, READ, same, lambda _: None)[0] is Outcome.HOST


def test_a_changed_entry_of_the_guest_drops_all(memory, guest, shadow, changes):
    shadow.fault(0x5000, READ, same, same)
    shadow.refresh(guest.root)
    assert not changes
    assert translate(memory, shadow.root, 0x5000)
    guest.unmap(0x9000)
    shadow.refresh(guest.root)
    assert changes
    assert translate(memory, shadow.root, 0x5000) is None


def test_tables_outside_memory_are_the_guests_fault(memory, pages):
    made = ShadowNpt(memory, pages, lambda: None)
    made.refresh(Gpa(1 << 40))
    assert made.fault(0x5000, READ, same, same)[0] is Outcome.GUEST
