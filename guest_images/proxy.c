/*
 * The proxy: runs programs of operations and reports what came of them. The
 * same code is L1, L2, L3 and the SMI handler; all it knows is its instance.
 */
#include "proxy.h"

#define RFLAGS_TF	(1u << 8)
#define RFLAGS_IF	(1u << 9)
#define RFLAGS_DF	(1u << 10)
#define RFLAGS_NT	(1u << 14)
#define RFLAGS_RF	(1u << 16)
#define RFLAGS_AC	(1u << 18)
#define RFLAGS_TRAPS	(RFLAGS_TF | RFLAGS_DF | RFLAGS_NT | RFLAGS_RF | RFLAGS_AC)

#define PF_VECTOR	14
#define NMI_VECTOR	2
#define XAPIC_EOI	0xfee000b0
#define X2APIC_EOI	0x80b
#define GATE_KERNEL	0x8e00
#define GATE_USER	0xee00
#define LOG_SIZE	sizeof(((struct proxy_instance *)0)->log)

struct gate {
	u16 offset_low, selector, flags, offset_mid;
	u32 offset_high, reserved;
};

struct table_pointer {
	u16 limit;
	u64 base;
} __attribute__((packed));

/* Stubs reach trap_entry through this: the same bytes do in every instance. */
static void *trap_entry_pointer = trap_entry;

static void load_idt(u64 base, u16 limit)
{
	struct table_pointer pointer = { limit, base };

	asm volatile("lidt %0" : : "m"(pointer));
}

static void write_stub(u8 *stub, u32 vector)
{
	u32 target = (u64)&trap_entry_pointer;
	u8 *p = stub;

	if (vector >= 32 || !(VECTORS_WITH_ERROR >> vector & 1)) {
		*p++ = 0x6a;			/* push $0 */
		*p++ = 0;
	}
	*p++ = 0x68;				/* push $vector */
	*p++ = vector;
	*p++ = 0;
	*p++ = 0;
	*p++ = 0;
	*p++ = 0xff;				/* call *trap_entry_pointer */
	*p++ = 0x14;
	*p++ = 0x25;
	*p++ = target;
	*p++ = target >> 8;
	*p++ = target >> 16;
	*p++ = target >> 24;
}

static void build_idt(struct proxy_instance *instance)
{
	struct gate *idt = (struct gate *)(instance->self + PROXY_IDT_OFFSET);
	u64 stub = instance->self + PROXY_STUBS_OFFSET;
	u32 i;

	for (i = 0; i < VECTORS; i++, stub += STUB_SIZE) {
		u16 gate = i == 3 || i == 4 || i >= 32 ? GATE_USER : GATE_KERNEL;

		write_stub((u8 *)stub, i);
		idt[i].offset_low = stub;
		idt[i].selector = PROXY_GDT_CS64;
		idt[i].flags = gate | (i == NMI_VECTOR ? PROXY_NMI_IST : PROXY_TRAP_IST);
		idt[i].offset_mid = stub >> 16;
		idt[i].offset_high = stub >> 32;
		idt[i].reserved = 0;
	}
	load_idt((u64)idt, VECTORS * sizeof(*idt) - 1);
}

static void report(struct proxy_instance *instance, u32 what)
{
	u32 value = (u32)instance->self | what;

	asm volatile("outl %0, %w1" : : "a"(value), "d"(PROXY_PORT) : "memory");
}

static void acknowledge(struct proxy_instance *instance)
{
	if (instance->eoi == EOI_XAPIC)
		*(volatile u32 *)XAPIC_EOI = 0;
	else if (instance->eoi == EOI_X2APIC)
		wrmsr(X2APIC_EOI, 0);
}

static void copy_registers(struct proxy_gprs *regs, const struct trap *trap)
{
	regs->rax = trap->rax;
	regs->rbx = trap->rbx;
	regs->rcx = trap->rcx;
	regs->rdx = trap->rdx;
	regs->rsi = trap->rsi;
	regs->rdi = trap->rdi;
	regs->rbp = trap->rbp;
	regs->r8 = trap->r8;
	regs->r9 = trap->r9;
	regs->r10 = trap->r10;
	regs->r11 = trap->r11;
	regs->r12 = trap->r12;
	regs->r13 = trap->r13;
	regs->r14 = trap->r14;
	regs->r15 = trap->r15;
}

/* Makes the trap return to where call_code or call_user was called. */
static void land(struct proxy_instance *instance, struct trap *trap, u64 status)
{
	copy_registers(&instance->regs, trap);
	instance->landing_status = status;
	trap->rip = (u64)landing;
	trap->cs = PROXY_GDT_CS64;
	trap->ss = PROXY_GDT_DS;
	trap->rsp = instance->landing_rsp;
	trap->rflags &= ~(u64)RFLAGS_TRAPS;
}

static void record(struct proxy_instance *instance, const struct trap *trap)
{
	instance->fault.vector = trap->vector;
	instance->fault.error = trap->error;
	instance->fault.cr2 = trap->vector == PF_VECTOR ? read_cr(2) : 0;
	instance->fault.rip = trap->rip;
	instance->fault.cs = trap->cs;
	instance->fault.rflags = trap->rflags;
	instance->fault.rsp = trap->rsp;
}

static void __attribute__((noreturn)) crash(struct proxy_instance *instance)
{
	for (;;)
		report(instance, REPORT_CRASH);
}

/* By INT, or by what a CPU or an emulator that refuses this INT raises in its place. */
static int returns_from_user(const struct trap *trap)
{
	return trap->vector == PROXY_RETURN_VECTOR || trap->rip == (u64)user_return;
}

void handle_trap(struct trap *trap)
{
	struct proxy_instance *instance =
		(struct proxy_instance *)(trap->stub & ~(u64)(INSTANCE_SIZE - 1));
	u32 policy = instance->policy[trap->vector];

	if (instance->in_op && returns_from_user(trap)) {
		land(instance, trap, 0);
		return;
	}
	instance->vectors[trap->vector]++;
	instance->log[instance->log_count++ % LOG_SIZE] = trap->vector;
	if (policy == POLICY_COUNT_EOI)
		acknowledge(instance);
	if (policy != POLICY_FAULT)
		return;
	record(instance, trap);
	if (!instance->in_op)
		crash(instance);
	land(instance, trap, 1);
}

static u64 read_word(u64 address, u64 size)
{
	switch (size) {
	case 1:
		return *(volatile u8 *)address;
	case 2:
		return *(volatile u16 *)address;
	case 4:
		return *(volatile u32 *)address;
	default:
		return *(volatile u64 *)address;
	}
}

static void load_arguments(struct proxy_gprs *regs, const struct proxy_op *op)
{
	regs->rax = op->args[0];
	regs->rbx = op->args[1];
	regs->rcx = op->args[2];
	regs->rdx = op->args[3];
	regs->rsi = op->args[4];
	regs->rdi = op->args[5];
	regs->r8 = op->args[6];
}

static void store_values(struct proxy_result *result, const struct proxy_gprs *regs)
{
	result->values[0] = regs->rax;
	result->values[1] = regs->rbx;
	result->values[2] = regs->rcx;
	result->values[3] = regs->rdx;
	result->values[4] = regs->rsi;
	result->values[5] = regs->rdi;
	result->values[6] = regs->r8;
}

static u32 store_fault(struct proxy_instance *instance, struct proxy_result *result)
{
	result->vector = instance->fault.vector;
	result->values[0] = instance->fault.error;
	result->values[1] = instance->fault.cr2;
	result->values[2] = instance->fault.rip;
	result->values[3] = instance->fault.cs;
	result->values[4] = instance->fault.rflags;
	result->values[5] = instance->fault.rsp;
	return RESULT_FAULT;
}

static u32 run_code(struct proxy_instance *instance, const struct proxy_op *op,
		    struct proxy_result *result, u64 target)
{
	u64 failed;

	load_arguments(&instance->regs, op);
	failed = op->flags & OP_USER ? call_user(instance, target) : call_code(instance, target);
	if (failed)
		return store_fault(instance, result);
	store_values(result, &instance->regs);
	return RESULT_DONE;
}

/* One instruction of the table with a value in RAX; 1 if it raised an exception. */
static u64 with_rax(struct proxy_instance *instance, u32 opcode, u64 rax)
{
	instance->regs.rax = rax;
	return call_code(instance, (u64)code_table + opcode * CODE_SLOT_SIZE);
}

static u64 load_guest_state(struct proxy_instance *instance, u64 vmcb_pa, u64 host_pa)
{
	return with_rax(instance, OP_VMSAVE, host_pa) || with_rax(instance, OP_VMLOAD, vmcb_pa);
}

static void load_host_state(struct proxy_instance *instance, u64 vmcb_pa, u64 host_pa)
{
	/* Cannot fail: the same addresses were good on the way in. */
	with_rax(instance, OP_VMSAVE, vmcb_pa);
	with_rax(instance, OP_VMLOAD, host_pa);
}

static void report_exit(struct proxy_result *result, struct vmcb *vmcb, u64 rip_advance)
{
	result->values[0] = vmcb->control.exit_code;
	result->values[1] = vmcb->control.exit_info_1;
	result->values[2] = vmcb->control.exit_info_2;
	result->values[3] = vmcb->control.exit_int_info;
	vmcb->save.rip += rip_advance;
}

static u32 enter_guest(struct proxy_instance *instance, const struct proxy_op *op,
		       struct proxy_result *result)
{
	u64 vmcb_pa = op->args[0], host_pa = op->args[2];
	struct proxy_gprs *guest = (struct proxy_gprs *)op->args[1];
	struct proxy_fault fault;
	u64 failed;

	if (op->flags & ENTER_CLGI && with_rax(instance, OP_CLGI, 0))
		return store_fault(instance, result);
	if (op->flags & ENTER_HOST_STATE && load_guest_state(instance, vmcb_pa, host_pa))
		return store_fault(instance, result);
	instance->regs = *guest;
	failed = with_rax(instance, OP_VMRUN, vmcb_pa);
	if (!failed)
		*guest = instance->regs;
	fault = instance->fault;
	if (op->flags & ENTER_HOST_STATE)
		load_host_state(instance, vmcb_pa, host_pa);
	if (op->flags & ENTER_STGI)
		with_rax(instance, OP_STGI, 0);
	instance->fault = fault;
	if (failed)
		return store_fault(instance, result);
	if (op->flags & ENTER_REPORT)
		report_exit(result, (struct vmcb *)vmcb_pa, op->args[3]);
	return RESULT_DONE;
}

static u32 spin_until(const struct proxy_op *op, struct proxy_result *result)
{
	u64 polls;

	for (polls = 0; polls < op->args[0]; polls++) {
		if (read_word(op->args[1], op->args[3]) == op->args[2]) {
			result->values[0] = polls;
			return RESULT_DONE;
		}
		pause();
	}
	result->values[0] = polls;
	return RESULT_BOUND;
}

static u64 save_flags(void)
{
	u64 flags;

	asm volatile("pushfq; popq %0" : "=r"(flags) : : "memory");
	return flags;
}

static u32 wait_interrupt(struct proxy_instance *instance, const struct proxy_op *op,
			  struct proxy_result *result)
{
	volatile u32 *counter = (volatile u32 *)((u64)instance + INSTANCE_VECTORS) +
				op->args[2] % VECTORS;
	u32 target = *counter + op->args[1];
	u64 flags = save_flags(), polls;

	for (polls = 0; polls < op->args[0] && *counter != target; polls++) {
		if (op->flags & WAIT_HLT)
			/* Looked at with interrupts off, or the last one could be missed. */
			asm volatile("cli; cmpl %0, %1; je 1f; sti; hlt; 1: sti"
				     : : "r"(target), "m"(*counter) : "memory", "cc");
		else
			asm volatile("sti; pause" : : : "memory");
	}
	if (!(flags & RFLAGS_IF))
		asm volatile("cli" : : : "memory");
	result->values[0] = polls;
	return *counter == target ? RESULT_DONE : RESULT_BOUND;
}

static void __attribute__((noreturn)) triple_fault(void)
{
	load_idt(0, 0);
	for (;;)
		asm volatile("ud2");
}

static u32 run(struct proxy_instance *instance, const struct proxy_op *op,
	       struct proxy_result *result, u32 count);

static int loop_goes_on(const struct proxy_op *op, u64 iteration)
{
	return iteration < op->args[0] &&
	       (!op->args[1] || *(volatile u64 *)op->args[1] != op->args[2]);
}

static u32 loop(struct proxy_instance *instance, const struct proxy_op *op,
		struct proxy_result *result)
{
	u64 iteration, faults = 0;

	for (iteration = 0; loop_goes_on(op, iteration); iteration++) {
		u32 now = run(instance, op + 1, result + 1, op->length);

		faults += now;
		if (now && op->flags & LOOP_STOP_ON_FAULT) {
			iteration++;
			break;
		}
	}
	result->values[0] = iteration;
	result->values[1] = faults;
	return RESULT_DONE;
}

static u32 execute(struct proxy_instance *instance, const struct proxy_op *op,
		   struct proxy_result *result)
{
	if (op->opcode < PROXY_INSTRUCTIONS)
		return run_code(instance, op, result,
				(u64)code_table + op->opcode * CODE_SLOT_SIZE);
	switch (op->opcode) {
	case OP_NOP:
		return RESULT_DONE;
	case OP_LOOP:
		return loop(instance, op, result);
	case OP_SPIN_UNTIL:
		return spin_until(op, result);
	case OP_EXEC:
		return run_code(instance, op, result, op->args[6]);
	case OP_SET_POLICY:
		instance->policy[op->args[0] % VECTORS] = op->args[2];
		return RESULT_DONE;
	case OP_TRIPLE_FAULT:
		triple_fault();
	case OP_WAIT_INTERRUPT:
		return wait_interrupt(instance, op, result);
	case OP_ENTER_GUEST:
		return enter_guest(instance, op, result);
	}
	return RESULT_BAD_OPCODE;
}

/* Runs `count` operations, those inside loops included; the number that faulted. */
static u32 run(struct proxy_instance *instance, const struct proxy_op *op,
	       struct proxy_result *result, u32 count)
{
	const struct proxy_op *end = op + count;
	const struct proxy_op *first = (const struct proxy_op *)instance->program;
	u32 faults = 0;

	while (op < end) {
		u32 step = 1 + (op->opcode == OP_LOOP ? op->length : 0);

		instance->current = op - first;
		result->status = execute(instance, op, result);
		faults += result->status != RESULT_DONE;
		op += step;
		result += step;
	}
	return faults;
}

void proxy_main(struct proxy_instance *instance)
{
	build_idt(instance);
	instance->done = instance->request;
	report(instance, REPORT_START);
	for (;;) {
		while (instance->request == instance->done)
			report(instance, REPORT_IDLE);
		run(instance, (const struct proxy_op *)instance->program,
		    (struct proxy_result *)instance->results, instance->count);
		instance->done = instance->request;
		report(instance, REPORT_DONE);
	}
}
