// SPDX-License-Identifier: GPL-2.0-only
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kvm_vm.h"

#ifndef KVM_CAP_XSAVE2			/* headers before Linux 5.17 */
#define KVM_CAP_XSAVE2		208
#define KVM_GET_XSAVE2		_IOR(KVMIO, 0xcf, struct kvm_xsave)
#endif

#ifndef KVM_CAP_X86_TRIPLE_FAULT_EVENT	/* headers before Linux 6.1 */
#define KVM_CAP_X86_TRIPLE_FAULT_EVENT 218
#endif

#define PTE_PRESENT_RW		0x27	/* and user, accessed */
#define PDE_LARGE		0xc0	/* and dirty */
#define CR0_PE_ET_NE_PG		0x80000031UL
#define CR4_PAE			0x20
#define EFER_LME_LMA		0x500

int kvm;

static jmp_buf next_request;
static __thread int goes_on;	/* with the next request, by way of next_request */

void fail(const char *format, ...)
{
	va_list arguments;

	printf("error ");
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n");
	if (goes_on)
		longjmp(next_request, 1);
	fflush(stdout);
	_exit(1);
}

void fail_for_good(void)
{
	goes_on = 0;
}

long must(long result, const char *what)
{
	if (result < 0)
		fail("%s: %s", what, strerror(errno));
	return result;
}

void *allocate(size_t bytes)
{
	void *memory = calloc(1, bytes);

	if (!memory)
		fail("out of memory");
	return memory;
}

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static void set_supported_cpuid(struct vm *vm)
{
	vm->cpuid = allocate(sizeof(*vm->cpuid) + MOST_LEAVES * sizeof(vm->cpuid->entries[0]));
	vm->cpuid->nent = MOST_LEAVES;
	IOCTL(kvm, KVM_GET_SUPPORTED_CPUID, vm->cpuid);
	IOCTL(vm->vcpu, KVM_SET_CPUID2, vm->cpuid);
}

/* As wants_whole_events() of harness/migrate/shape.py. */
static void enable_whole_events(struct vm *vm)
{
	static const int caps[] = { KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT };
	size_t i;

	for (i = 0; i < ARRAY_SIZE(caps); i++) {
		struct kvm_enable_cap cap = { .cap = caps[i], .args = { 1 } };

		if (ioctl(vm->fd, KVM_CHECK_EXTENSION, caps[i]) > 0)
			IOCTL(vm->fd, KVM_ENABLE_CAP, &cap);
	}
}

void open_vm(struct vm *vm, int irqchip)
{
	memset(vm, 0, sizeof(*vm));
	vm->fd = IOCTL(kvm, KVM_CREATE_VM, 0);
	enable_whole_events(vm);
	if (ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_SET_TSS_ADDR) > 0)
		IOCTL(vm->fd, KVM_SET_TSS_ADDR, TSS_GPA);
	if (irqchip && ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP) > 0)
		IOCTL(vm->fd, KVM_CREATE_IRQCHIP, 0);
	vm->vcpu = IOCTL(vm->fd, KVM_CREATE_VCPU, 0);
	vm->run_bytes = IOCTL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm->run = mmap(NULL, vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	if (vm->run == MAP_FAILED)
		fail("mmap of the vCPU: %s", strerror(errno));
	set_supported_cpuid(vm);
}

void close_vm(struct vm *vm)
{
	munmap(vm->run, vm->run_bytes);
	close(vm->vcpu);
	close(vm->fd);
	if (vm->memory)
		munmap(vm->memory, vm->memory_bytes);
	free(vm->xsave);
	free(vm->msrs);
	free(vm->nested);
	free(vm->cpuid);
}

static void set_segment(struct kvm_segment *segment, int type, int is_long)
{
	*segment = (struct kvm_segment) {
		.limit = 0xffffffff, .selector = is_long ? 0x18 : 0x10, .type = type,
		.present = 1, .db = !is_long, .s = 1, .l = is_long, .g = 1,
	};
}

static void enter_long_mode(struct vm *vm)
{
	struct kvm_sregs *sregs = &vm->sregs;

	IOCTL(vm->vcpu, KVM_GET_SREGS, sregs);
	set_segment(&sregs->cs, 11, 1);
	set_segment(&sregs->ds, 3, 0);
	sregs->es = sregs->fs = sregs->gs = sregs->ss = sregs->ds;
	sregs->cr0 = CR0_PE_ET_NE_PG;
	sregs->cr3 = PML4_GPA;
	sregs->cr4 = CR4_PAE;
	sregs->efer = EFER_LME_LMA;
	IOCTL(vm->vcpu, KVM_SET_SREGS, sregs);
	vm->regs = (struct kvm_regs) { .rip = CODE_GPA, .rflags = 2 };
	IOCTL(vm->vcpu, KVM_SET_REGS, &vm->regs);
}

void set_memory_flags(struct vm *vm, uint32_t flags)
{
	struct kvm_userspace_memory_region region = {
		.flags = flags, .memory_size = vm->memory_bytes,
		.userspace_addr = (uintptr_t)vm->memory,
	};

	IOCTL(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
}

void add_memory(struct vm *vm, size_t memory_bytes)
{
	void *memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail("mmap of guest memory: %s", strerror(errno));
	vm->memory = memory;
	vm->memory_bytes = memory_bytes;
	set_memory_flags(vm, 0);
}

void load_code(struct vm *vm, size_t memory_bytes, const void *code, size_t code_bytes)
{
	uint64_t *pd, at;

	add_memory(vm, memory_bytes);
	*(uint64_t *)(vm->memory + PML4_GPA) = PDPT_GPA | PTE_PRESENT_RW;
	*(uint64_t *)(vm->memory + PDPT_GPA) = PD_GPA | PTE_PRESENT_RW;
	pd = (uint64_t *)(vm->memory + PD_GPA);
	for (at = 0; at < memory_bytes && at < 512 * LARGE_PAGE_BYTES; at += LARGE_PAGE_BYTES)
		*pd++ = at | PTE_PRESENT_RW | PDE_LARGE;
	memcpy(vm->memory + CODE_GPA, code, code_bytes);
	enter_long_mode(vm);
}

void run_to_port(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_RUN, 0);
	if (vm->run->exit_reason != KVM_EXIT_IO || vm->run->io.direction != KVM_EXIT_IO_OUT)
		fail("KVM_RUN: exit reason %u", vm->run->exit_reason);
}

/* --- parts of a vCPU's state --- */

#define PLAIN_PART(part, GET, SET)						\
static void get_##part(struct vm *vm) { IOCTL(vm->vcpu, GET, &vm->part); }	\
static void set_##part(struct vm *vm) { IOCTL(vm->vcpu, SET, &vm->part); }	\
static void *part##_data(struct vm *vm) { return &vm->part; }			\
static uint64_t part##_bytes(struct vm *vm) { return sizeof(vm->part); }

PLAIN_PART(regs, KVM_GET_REGS, KVM_SET_REGS)
PLAIN_PART(sregs, KVM_GET_SREGS, KVM_SET_SREGS)
PLAIN_PART(xcrs, KVM_GET_XCRS, KVM_SET_XCRS)
PLAIN_PART(debugregs, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS)
PLAIN_PART(mp_state, KVM_GET_MP_STATE, KVM_SET_MP_STATE)
PLAIN_PART(events, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS)
PLAIN_PART(lapic, KVM_GET_LAPIC, KVM_SET_LAPIC)

static void prepare_xsave(struct vm *vm)
{
	int offered = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);

	vm->has_xsave2 = offered > 0;
	vm->xsave_size = vm->has_xsave2 ? (size_t)offered : sizeof(*vm->xsave);
	vm->xsave = allocate(vm->xsave_size);
}

static void get_xsave(struct vm *vm)
{
	if (vm->has_xsave2)
		IOCTL(vm->vcpu, KVM_GET_XSAVE2, vm->xsave);
	else
		IOCTL(vm->vcpu, KVM_GET_XSAVE, vm->xsave);
}

static void set_xsave(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_SET_XSAVE, vm->xsave);
}

static void *xsave_data(struct vm *vm)
{
	return vm->xsave;
}

static uint64_t xsave_bytes(struct vm *vm)
{
	return vm->xsave_size;
}

static void prepare_nested(struct vm *vm)
{
	vm->nested_bytes = ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE);
	if (vm->nested_bytes <= 0)
		fail("KVM_CAP_NESTED_STATE: not offered");
	vm->nested = allocate(vm->nested_bytes);
}

static void get_nested(struct vm *vm)
{
	vm->nested->size = vm->nested_bytes;
	IOCTL(vm->vcpu, KVM_GET_NESTED_STATE, vm->nested);
}

static void set_nested(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_SET_NESTED_STATE, vm->nested);
}

static void *nested_data(struct vm *vm)
{
	return vm->nested;
}

static uint64_t nested_bytes(struct vm *vm)
{
	return vm->nested->size;
}

void keep_msr(struct vm *vm, uint32_t index)
{
	struct {
		struct kvm_msrs header;
		struct kvm_msr_entry entry;
	} one = { .header.nmsrs = 1, .entry.index = index };

	if (vm->msrs->nmsrs < MOST_MSRS && ioctl(vm->vcpu, KVM_GET_MSRS, &one) == 1 &&
	    ioctl(vm->vcpu, KVM_SET_MSRS, &one) == 1)
		vm->msrs->entries[vm->msrs->nmsrs++] = one.entry;
}

/* The first MSRs of KVM's list that can be read and written back; the others are left out. */
static void prepare_msrs(struct vm *vm)
{
	struct kvm_msr_list *list, ask = { .nmsrs = 0 };
	uint32_t i;

	if (ioctl(kvm, KVM_GET_MSR_INDEX_LIST, &ask) == 0 || errno != E2BIG)
		fail("KVM_GET_MSR_INDEX_LIST: does not say how many there are");
	list = allocate(sizeof(*list) + ask.nmsrs * sizeof(list->indices[0]));
	list->nmsrs = ask.nmsrs;
	IOCTL(kvm, KVM_GET_MSR_INDEX_LIST, list);
	vm->msrs = allocate(sizeof(*vm->msrs) + MOST_MSRS * sizeof(vm->msrs->entries[0]));
	for (i = 0; i < list->nmsrs; i++)
		keep_msr(vm, list->indices[i]);
	free(list);
}

static void get_msrs(struct vm *vm)
{
	if (IOCTL(vm->vcpu, KVM_GET_MSRS, vm->msrs) != vm->msrs->nmsrs)
		fail("KVM_GET_MSRS: refused one that it gave before");
}

static void set_msrs(struct vm *vm)
{
	if (IOCTL(vm->vcpu, KVM_SET_MSRS, vm->msrs) != vm->msrs->nmsrs)
		fail("KVM_SET_MSRS: refused one that it took before");
}

static void *msrs_data(struct vm *vm)
{
	return vm->msrs->entries;
}

static uint64_t msrs_bytes(struct vm *vm)
{
	return vm->msrs->nmsrs * sizeof(vm->msrs->entries[0]);
}

const struct part all_parts[PART_COUNT] = {
	{ "regs", NULL, get_regs, set_regs, regs_data, regs_bytes },
	{ "sregs", NULL, get_sregs, set_sregs, sregs_data, sregs_bytes },
	{ "xcrs", NULL, get_xcrs, set_xcrs, xcrs_data, xcrs_bytes },
	{ "debugregs", NULL, get_debugregs, set_debugregs, debugregs_data, debugregs_bytes },
	{ "mp_state", NULL, get_mp_state, set_mp_state, mp_state_data, mp_state_bytes },
	{ "events", NULL, get_events, set_events, events_data, events_bytes },
	{ "lapic", NULL, get_lapic, set_lapic, lapic_data, lapic_bytes },
	{ "xsave", prepare_xsave, get_xsave, set_xsave, xsave_data, xsave_bytes },
	{ "msrs", prepare_msrs, get_msrs, set_msrs, msrs_data, msrs_bytes },
	{ "nested", prepare_nested, get_nested, set_nested, nested_data, nested_bytes },
};

int serve_requests(void (*serve)(const char *line))
{
	static char line[512];

	setvbuf(stdout, NULL, _IOLBF, 0);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		printf("error /dev/kvm: %s\n", strerror(errno));
		return 1;
	}
	while (fgets(line, sizeof(line), stdin)) {
		alarm(DEADLINE_S);
		/* What a failed request leaves open ends with the process, soon. */
		goes_on = 1;
		if (!setjmp(next_request))
			serve(line);
		alarm(0);
	}
	return 0;
}
