"""The KVM API as typed Python, with the kernel's own names; standard library only.

``handles`` has the objects to work with (``Kvm``, ``Vm``, ``Vcpu``, ...), ``requests`` one line per
ioctl, ``exits`` what KVM_RUN comes back with. Structs and constants are in one module per kernel
header: ``linux_kvm`` (with ``kvm_run``, ``capabilities`` and ``exit_codes``), ``asm_kvm`` (with
``asm_kvm_xen`` and ``asm_kvm_coco``). ``abi`` checks all of them against kernel headers. ::

    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        regs = vcpu.get(Vcpu.KVM_GET_REGS)
        error = vcpu.try_call(Vcpu.KVM_SET_REGS, regs)  # 0, or an errno
        vcpu.call(Vcpu.KVM_SET_REGS, regs)  # or raises KvmError
"""
