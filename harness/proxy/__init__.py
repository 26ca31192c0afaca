"""Guests under remote control: L1, L2, L3 and the SMI handler, driven from Python.

A *level* (`Level`) runs a small interpreter of operations, the proxy. A program of many operations
costs one crossing; every operation reports its registers, or the exception that it raised::

    from harness.proxy.machine import ProxyMachine
    from harness.proxy.program import cpuid, loop, load, rdmsr, simple, store, vmmcall
    from harness.svm.exit_codes import ExitCode

    with ProxyMachine(kvm) as machine:              # irqchip=True, smm=True, vcpus=2, cpuid=...
        l1 = machine.l1
        l1.rdmsr(0xC0000080)                        # short form: a value, or raises GuestFault
        result = l1.do(rdmsr(0x12345678))           # long form: a Result
        result.fault.vector, result.fault.error_code    # 13, 0
        l1.fault_of(simple("VMRUN").user)           # any instruction at CPL 3: a Fault, or None
        l1.run([store(l1.scratch, 1), loop(1000, [load(l1.scratch)])])   # one crossing
        l1.exec(bytes.fromhex("4801d8"), rax=3, rbx=4)["rax"]            # 7: any machine code

        l2 = l1.launch(vmcb={"intercept.cpuid": 1}, npt=True, msrpm=[0x10], iopm=[0x80])
        l2.ping()                                   # L1 executes VMRUN, L2 answers
        exit_ = l2.run_to_exit(cpuid(0))            # L2 runs until #VMEXIT
        assert exit_.exit_code == ExitCode.SVM_EXIT_CPUID
        exit_.vmcb["rax"], exit_.gprs.rcx           # the whole VMCB by kernel names, and GPRs
        exit_.vmcb["rax"] = 0x1234                  # L1's answer
        l2.set_gprs(rbx=0x5678)
        exit_.skip()                                # RIP past the instruction
        results = l2.finish()                       # L2 goes on to the end of its program
        results[0].regs["rbx"]                      # 0x5678
        l1.ping()                                   # L1 is reached by a VMMCALL of L2

Running: `run` returns results and raises UnexpectedVmExit; `run_to_exit` returns the exit and
raises MissingVmExit; `start` returns whichever comes. After an exit `finish`, `resume_to_exit` and
`resume` go on in the same three ways. `l2.on_exit.append(hook)` lets Python, as L1, handle exits on
the fly.

VMRUN without a proxy behind it: `l2.vmcb["asid"] = 0; l2.enter().exit_code` (also for
`l2.vmcb["rip"] = l1.instance.put_code(...)`); the bare instruction is `l1.do(vmrun(pa))`.
`l2.reset()` writes the VMCB as launched again. An exception of VMRUN in L1 is a GuestFault.

A level in the middle of a program takes no other one (ProxyError): resume it, or abandon what it
was at with `l2.reset()` or `l2.enter()`.

Writing `l2.vmcb` while L2 is current changes memory only, as on silicon: use
`l2.configure({"intercept.rdtsc": 1})`, which goes back to L1 first, or pass it to `launch`.

VMCB fields are `save.rip` or `rip`, `control.asid` or `asid`, `save.cs.attrib`,
`int_ctl.V_INTR_MASKING`, `intercept.vmmcall`, `intercept.excp.14`. A level's own page tables are
`level.tables`, nested ones `l2.npt`: `l2.npt.unmap(gpa)`, `.protect(gpa, clear=Pte.W)`,
`.set_entry(gpa, raw)`. MSRs and ports: `l2.intercept_msr(0x10, write=False)`,
`l2.msrpm.write(raw)`, `l2.intercept_port(0x80)`.

L3 is `l2.launch(...)`: from then on L1 emulates SVM for L2 (`nesting`), in Python, and L2 cannot
tell. Exits that L2 asked for are returned with `exit.host` L2, those only L1 asked for with L1.

Exceptions and interrupts: `level.set_policy(vector, Policy.COUNT)` counts a vector and goes on;
`level.counted(vector)`, `level.instance.vector_log()`. Vectors from 32 up are counted and the local
APIC told (`level.instance.set_eoi(Eoi.XAPIC)`, by default it is not), 0 to 31 end the operation.

The SMI handler, with `smm=True`: `smm = machine.inject_smi()`, then `smm` is a level too;
`smm.save_area` and `smm.write_save_area(state)`, and `smm.rsm()` returns the level that goes on.

What does not go as it should is a ScenarioFailure with registers, levels, VMCBs and the last
operations: GuestStopped (`.event` is KVM's exit, a ShutdownExit for example), ProxyTimeout,
ProxyFailure. Instructions are lines in `ops.INSTRUCTIONS`; one more line is one more operation.
"""
