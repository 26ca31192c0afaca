"""EXITINFO1 of the exits that describe an access (APM vol. 2, chapter 15)."""

from harness.svm.bits import Bits, bits


class IoioInfo(Bits):
    """EXITINFO1 of an IOIO exit (APM vol. 2, 15.10.2 IN and OUT Behavior)."""

    PORT = bits(31, 16)
    SEG = bits(12, 10)
    A64 = bits(9)
    A32 = bits(8)
    A16 = bits(7)
    SZ32 = bits(6)
    SZ16 = bits(5)
    SZ8 = bits(4)
    REP = bits(3)
    STR = bits(2)
    TYPE = bits(0)

    @property
    def size_bytes(self) -> int:
        """Bytes of one access: the size bits are its length."""
        return 4 * self.SZ32 | 2 * self.SZ16 | self.SZ8


class NpfInfo(Bits):
    """EXITINFO1 of #NPF (APM vol. 2, 15.25.6 Nested versus Guest Page Faults)."""

    GUEST_PAGE_TABLE = bits(33)
    GUEST_FINAL = bits(32)
    ID = bits(4)
    RSV = bits(3)
    US = bits(2)
    RW = bits(1)
    P = bits(0)
