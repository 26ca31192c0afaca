"""What the model must be told of a CPU: the guest's CPUID, and what the host below offers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from harness.svm.msrs import Cr4, Efer

GUEST_FEATURES: Final = ("svm", "lm", "npt", "nx")
"""The features that `SetCpuid` can take away and give back."""

CR4_RESERVED: Final = 0xFFFF_FFFF_FFFF_FFFF & ~(
    Cr4.of(VME=1, PVI=1, TSD=1, DE=1, PSE=1, PAE=1, MCE=1, PGE=1, PCE=1, OSFXSR=1, OSXMMEXCPT=1)
)
"""Of a guest whose CPUID offers none of the features that have a bit above 10."""


@dataclass(frozen=True, kw_only=True)
class CpuFacts:
    """One host's and one guest's CPU. The defaults are those of the emulated silicon."""

    # The guest's CPUID

    maxphyaddr: int = 40
    svm: bool = True
    lm: bool = True
    npt: bool = True
    nx: bool = True
    ffxsr: bool = True
    nrips: bool = False
    vgif: bool = True
    vnmi: bool = False
    lbrv: bool = False
    autoibrs: bool = False
    pause_filter: bool = False
    pf_threshold: bool = False
    xsave: bool = True
    invpcid: bool = True
    rdtscp: bool = True
    skinit: bool = False
    rdpru: bool = False
    shstk: bool = False
    cr4_reserved: int = CR4_RESERVED
    """Bits of CR4 that the guest's CPUID does not offer."""

    # The host

    nested: bool = True
    """kvm_amd's parameter `nested`."""
    npt_on_l0: bool = True
    """kvm_amd's parameter `npt`, and a CPU that has it."""
    vgif_on_l0: bool = True
    """kvm_amd's parameter `vgif`, and a CPU that has it; `vgif` is what the guest is offered."""
    lmsle: bool = True
    """EFER.LMSLE is not reserved on the host (CPUID 8000_0008 EBX[20] is 0)."""
    sev_es: bool = False
    silicon: str = "QEMU 7.2"
    """By which list of `checks` the CPU itself refuses a VMCB."""
    mce_on_host: bool = True
    """The host runs with CR4.MCE, which KVM therefore sets in every guest's hardware CR4."""
    loads_shadow: bool = False
    """VMRUN takes the interrupt shadow from the VMCB (QEMU 7.2's helper_vmrun() does not)."""
    loads_cpl: bool = False
    """VMRUN takes the CPL from the VMCB (QEMU 7.2's helper_vmrun() takes SS.DPL)."""
    cpu_checks_rax: bool = True
    """VMRUN, VMLOAD and VMSAVE of an address that is not of a page: #GP before the intercept."""

    def host_takes_efer(self, efer: int) -> bool:
        """Tell whether the host's KVM knows all bits of an EFER (`efer_reserved_bits`)."""
        known = Efer.of(
            SCE=1,
            LME=1,
            LMA=1,
            NX=1,
            FFXSR=self.ffxsr,
            SVME=self.nested,
            LMSLE=self.nested and self.lmsle,
            AUTOIBRS=self.autoibrs,
        )
        return not efer & ~int(known)

    def guest_may_have_efer(self, efer: int) -> bool:
        """Tell whether the guest's CPUID offers all bits of an EFER (`kvm_valid_efer()`)."""
        offered = Efer.of(SVME=self.svm, LME=self.lm, LMA=self.lm, NX=self.nx, FFXSR=self.ffxsr)
        conditional = Efer.of(SVME=1, LME=1, LMA=1, NX=1, FFXSR=1)
        return self.host_takes_efer(efer) and not efer & int(conditional) & ~int(offered)

    def is_legal_gpa(self, gpa: int) -> bool:
        """Tell whether an address is below MAXPHYADDR."""
        return not gpa >> self.maxphyaddr

    def is_page_address(self, gpa: int) -> bool:
        """Tell whether an address is that of a page below MAXPHYADDR (`page_address_valid()`)."""
        return self.is_legal_gpa(gpa) and not gpa & 0xFFF

    def but(self, **changes: Any) -> CpuFacts:
        """Return these facts with some of them changed."""
        return replace(self, **changes)
