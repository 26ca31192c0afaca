/*
 * Walks one vCPU through the life of nested SVM state: EFER.SVME on, one L2
 * from VMRUN to #VMEXIT, EFER.SVME off; and reports each stage to userspace.
 */
#include "svm.h"
#include "svme.h"

#define PAT_DEFAULT	0x0007040600070406
#define DR6_DEFAULT	0xffff0ff0
#define DR7_DEFAULT	0x400
#define RFLAGS_FIXED	0x2
#define L2_ASID		1
#define VMMCALL_LENGTH	3
#define SEG_PRESENT	(SEG_ATTRIB_P | SEG_ATTRIB_S)
#define SEG_CODE64	(SEG_PRESENT | SEG_ATTRIB_G | SEG_ATTRIB_L | 0xb)
#define SEG_DATA	(SEG_PRESENT | SEG_ATTRIB_G | SEG_ATTRIB_DB | 0x3)

struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8;
	u64 rdi, rsi, rbp, rbx, rdx, rcx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct gate {
	u16 offset_low, selector, flags, offset_mid;
	u32 offset_high, reserved;
};

struct table_pointer {
	u16 limit;
	u64 base;
} __attribute__((packed));

struct fixup {
	u64 insn, target;
};

extern char exception_stubs[];
extern const struct fixup ex_table[], ex_table_end[];

static struct cpu_area cpu_areas[MAX_VCPUS]
	__attribute__((section(".cpu_areas,\"aw\",@nobits#"), aligned(PAGE_SIZE)));
static struct gate idt[EXCEPTIONS];

/* GS is shared by L1 and L2: VMRUN and #VMEXIT leave it alone. */
static volatile struct report *this_report(void)
{
	u64 self;

	asm volatile("movq %%gs:0, %0" : "=r"(self));
	return (volatile struct report *)self;
}

static struct cpu_area *this_area(void)
{
	return (struct cpu_area *)this_report();
}

static u32 stage(u32 number)
{
	volatile struct report *report = this_report();
	u32 command;

	do {
		report->stage = number;
		report->stage_count++;
		report->efer = rdmsr(MSR_EFER);
		outb(STAGE_PORT, number);
		while ((command = report->command) == COMMAND_SPIN)
			pause();
		report->command = COMMAND_CONTINUE;
	} while (command == COMMAND_AGAIN);
	return command;
}

static void __attribute__((noreturn)) finish(u32 status)
{
	stage(STAGE_DONE);
	outb(DEBUG_EXIT_PORT, status);
	for (;;)
		hlt();
}

void handle_exception(struct frame *frame)
{
	volatile struct report *report = this_report();
	const struct fixup *fixup;

	report->fault_vector = frame->vector;
	report->fault_error = frame->error;
	report->fault_rip = frame->rip;
	report->fault_cr2 = read_cr(2);
	stage(STAGE_FAULT);
	for (fixup = ex_table; fixup < ex_table_end; fixup++) {
		if (fixup->insn == frame->rip) {
			frame->rip = fixup->target;
			return;
		}
	}
	finish(STATUS_FAULT);
}

static void load_idt(void)
{
	struct table_pointer pointer = { sizeof(idt) - 1, (u64)idt };
	u64 stub = (u64)exception_stubs;
	int i;

	for (i = 0; i < EXCEPTIONS; i++, stub += EXCEPTION_STUB_SIZE) {
		idt[i].offset_low = stub;
		idt[i].selector = GDT_CS64;
		idt[i].flags = 0x8e00;
		idt[i].offset_mid = stub >> 16;
		idt[i].offset_high = stub >> 32;
	}
	asm volatile("lidt %0" : : "m"(pointer));
}

/* Later stages must not fault in L0's MMU: memory is measured across them. */
static void touch_pages(volatile char *start, volatile char *end, int write)
{
	volatile char *page;

	for (page = start; page < end; page += PAGE_SIZE) {
		char value = *page;

		if (write)
			*page = value;
	}
}

static void read_features(volatile struct report *report)
{
	u32 a, b, c, d;

	cpuid(CPUID_LEAF_EXTENDED, &a, &b, &c, &d);
	if (a < CPUID_LEAF_SVM)
		return;
	cpuid(CPUID_LEAF_EXTENDED_FEATURES, &a, &b, &c, &d);
	report->has_svm = !!(c & CPUID_8000_0001_ECX_SVM);
	cpuid(CPUID_LEAF_SVM, &a, &b, &c, &d);
	report->svm_features = d;
	report->has_npt = report->has_svm && (d & CPUID_8000_000A_EDX_NPT);
}

static void init_vcpu(u64 index)
{
	struct cpu_area *area = &cpu_areas[index];
	volatile struct report *report = &area->report;
	char *stack = stacks + index * STACK_SIZE;

	load_idt();
	wrmsr(MSR_GS_BASE, (u64)area);
	report->self_gpa = (u64)area;
	report->index = index;
	report->level = 1;
	report->vmcb12_gpa = (u64)area->vmcb12;
	read_features(report);
	touch_pages(image_start, stacks, 0);
	touch_pages(stack, stack + STACK_SIZE, 1);
	touch_pages((char *)area, (char *)(area + 1), 1);
}

static int set_svme(int on)
{
	u64 efer = rdmsr(MSR_EFER) & ~(u64)EFER_SVME;

	return wrmsr_safe(MSR_EFER, efer | (on ? EFER_SVME : 0));
}

static void intercept(struct vmcb *vmcb, u32 number)
{
	vmcb->control.intercepts[number / 32] |= 1u << number % 32;
}

static void l2_main(void)
{
	for (;;) {
		this_report()->level = 2;
		stage(STAGE_IN_L2);
		vmmcall();
	}
}

static void set_segment(struct vmcb_seg *seg, u16 selector, u16 attrib)
{
	seg->selector = selector;
	seg->attrib = attrib;
	seg->limit = 0xffffffff;
	seg->base = 0;
}

static void prepare_l2_state(struct vmcb_save_area *save)
{
	struct table_pointer gdt;

	asm volatile("sgdt %0" : "=m"(gdt));
	set_segment(&save->cs, GDT_CS64, SEG_CODE64);
	set_segment(&save->ss, GDT_DS, SEG_DATA);
	set_segment(&save->ds, GDT_DS, SEG_DATA);
	set_segment(&save->es, GDT_DS, SEG_DATA);
	save->gdtr.limit = gdt.limit;
	save->gdtr.base = gdt.base;
	save->idtr.limit = sizeof(idt) - 1;
	save->idtr.base = (u64)idt;
	save->efer = rdmsr(MSR_EFER);
	save->cr0 = read_cr(0);
	save->cr3 = read_cr(3);
	save->cr4 = read_cr(4);
	save->dr6 = DR6_DEFAULT;
	save->dr7 = DR7_DEFAULT;
	save->g_pat = PAT_DEFAULT;
	save->rflags = RFLAGS_FIXED;
	save->rip = (u64)l2_main;
	/* As after a call: the ABI wants rsp + 8 aligned to 16. */
	save->rsp = (u64)this_area()->l2_stack + PAGE_SIZE - 8;
}

static void prepare_l2(struct cpu_area *area)
{
	struct vmcb *vmcb = (struct vmcb *)area->vmcb12;
	u64 i;

	for (i = 0; i < VMCB_SIZE / 8; i++)
		((volatile u64 *)vmcb)[i] = 0;
	wrmsr(MSR_VM_HSAVE_PA, (u64)area->hsave);
	intercept(vmcb, INTERCEPT_VMRUN);
	intercept(vmcb, INTERCEPT_VMMCALL);
	/* An empty map: nothing is intercepted, but L0 has to read and merge it. */
	intercept(vmcb, INTERCEPT_MSR_PROT);
	vmcb->control.msrpm_base_pa = (u64)area->msrpm;
	vmcb->control.asid = L2_ASID;
	area->report.uses_npt = area->report.has_npt &&
				!(area->report.options & OPTION_NO_NPT);
	if (area->report.uses_npt) {
		vmcb->control.nested_ctl = NESTED_CTL_NP_ENABLE;
		vmcb->control.nested_cr3 = (u64)npt_pml4;
	}
	prepare_l2_state(&vmcb->save);
}

static u32 run_l2(struct cpu_area *area)
{
	volatile struct vmcb *vmcb = (struct vmcb *)area->vmcb12;
	volatile struct report *report = &area->report;
	u32 command;

	prepare_l2(area);
	do {
		if (!vmrun((u64)vmcb))
			finish(STATUS_FAULT);
		report->level = 1;
		stgi();
		report->exit_code = vmcb->control.exit_code;
		report->exit_info_1 = vmcb->control.exit_info_1;
		report->exit_info_2 = vmcb->control.exit_info_2;
		command = stage(STAGE_L2_EXITED);
		vmcb->save.rip += VMMCALL_LENGTH;
	} while (command == COMMAND_RUN_L2);
	return command;
}

static u32 walk(struct cpu_area *area)
{
	u32 command = COMMAND_CONTINUE;

	if (set_svme(1)) {
		command = stage(STAGE_SVME_ON);
		if (command == COMMAND_CONTINUE)
			command = run_l2(area);
		if (command == COMMAND_STOP)
			return command;
		set_svme(0);
	}
	return stage(STAGE_SVME_OFF);
}

static u32 status_of(const struct report *report)
{
	if (!report->has_svm)
		return STATUS_NO_SVM;
	/* 0 when no L2 ran: then there is nothing to judge. */
	if (report->exit_code && report->exit_code != SVM_EXIT_VMMCALL)
		return STATUS_BAD_L2_EXIT;
	return STATUS_OK;
}

void guest_main(u64 index)
{
	struct cpu_area *area = &cpu_areas[index];
	u32 command;

	init_vcpu(index);
	command = stage(STAGE_READY);
	if (command != COMMAND_STOP && !area->report.has_svm)
		command = stage(STAGE_NO_SVM) == COMMAND_TOGGLE ? COMMAND_TOGGLE : COMMAND_STOP;
	if (command != COMMAND_STOP) {
		do {
			command = walk(area);
		} while (command == COMMAND_TOGGLE);
	}
	finish(status_of(&area->report));
}
