"""A guest's GIF where its host emulates SVM for it, and what the host holds back while it is 0.

APM vol. 2, 15.17 Global Interrupt Flag, STGI and CLGI Instructions. The guest runs with the CPU's
GIF at 1, so the host makes it deaf by other means, and passes on later what came in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.proxy.program import NMI
from harness.proxy.vmcb_view import VmcbView
from harness.svm.vmcb import EventInj

if TYPE_CHECKING:
    from harness.proxy.guest_level import GuestLevel

DEAF: Final = {
    # With this, the host's RFLAGS.IF, which is 0, holds interrupts back.
    "int_ctl.V_INTR_MASKING": 1,
    # The host takes the NMI and remembers it.
    "intercept.nmi": 1,
}
"""What the guest's VMCB has while its GIF is 0."""

_NMI_EVENT: Final = EventInj.of(VALID=1, TYPE=2, VEC=NMI)


class VirtualGif:
    """The GIF of one guest."""

    def __init__(self, guest: GuestLevel) -> None:
        self._guest = guest
        self._asked: dict[str, int] = {}
        self.is_set = True
        self.nmi_held = False
        """An NMI came that the guest is to see once its GIF is 1; there is never more than one."""

    @property
    def holds_nmis(self) -> bool:
        """Whether an NMI that exits is held for the guest, not one that the host had asked for."""
        return not self.is_set and not self._asked["intercept.nmi"]

    def set(self) -> None:
        """Set GIF: the VMCB is again as the host had it."""
        if not self.is_set:
            self.is_set = True
            self._guest.vmcb.update(self._asked)

    def clear(self) -> None:
        """Clear GIF."""
        if self.is_set:
            self.is_set = False
            self._asked = {name: self._guest.vmcb[name] for name in DEAF}
            self._guest.vmcb.update(DEAF)

    def hold_nmi(self) -> None:
        """Remember an NMI that the host took in the guest's place."""
        self.nmi_held = True

    def inject_held_nmi(self, view: VmcbView) -> None:
        """Let an NMI that was held come with the next VMRUN; one behind an event waits on."""
        if self.nmi_held and not view["event_inj.VALID"]:
            self.nmi_held = False
            view.update({"event_inj": _NMI_EVENT, "event_inj_err": 0})

    def reset(self) -> None:
        """Be as after launch: set, nothing held; the VMCB was written anew."""
        self.is_set, self.nmi_held = True, False
