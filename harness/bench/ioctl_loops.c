// SPDX-License-Identifier: GPL-2.0-only
/*
 * The C side of the ioctl benchmarks: the loops of loops.py as a C program would write them, with
 * sizes asked for once and buffers used again.
 *
 * Reads one request per line, "LOOP COUNT PARTS" (parts separated by commas, or "-"), and answers
 * each with one line: "ok DONE WITNESS NANOSECONDS" or "error TEXT". DONE is how many rounds of
 * the loop went well, WITNESS a number that the kernel gave and that shows what was done; both must
 * be the same on the Python side. Only the loop itself is timed.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef KVM_CAP_XSAVE2			/* headers before Linux 5.17 */
#define KVM_CAP_XSAVE2		208
#define KVM_GET_XSAVE2		_IOR(KVMIO, 0xcf, struct kvm_xsave)
#endif

#define ARRAY_SIZE(a)		(sizeof(a) / sizeof((a)[0]))

#define DEADLINE_S		120	/* of one request; SIGALRM ends the process */
#define MAX_FDS			4096
#define MAX_VCPUS		512
#define MOST_MSRS		255	/* msr_io() answers E2BIG to 256 and more */
#define MOST_LEAVES		256

#define MEMORY_BYTES		0x10000
#define PML4_GPA		0x2000
#define PDPT_GPA		0x3000
#define PD_GPA			0x4000
#define CODE_GPA		0xa000
#define TSS_GPA			0xfffbd000UL

#define PTE_PRESENT_RW		0x27	/* and user, accessed */
#define PDE_LARGE		0xc0	/* and dirty */
#define CR0_PE_ET_NE_PG		0x80000031UL
#define CR4_PAE			0x20
#define EFER_LME_LMA		0x500

struct result {
	uint64_t done;
	uint64_t witness;
	uint64_t ns;
};

/* One VM with one vCPU, and a buffer for each part of its state. */
struct vm {
	int fd;
	int vcpu;
	void *memory;
	struct kvm_run *run;
	int run_bytes;
	int has_xsave2;
	size_t xsave_size;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_mp_state mp_state;
	struct kvm_vcpu_events events;
	struct kvm_lapic_state lapic;
	struct kvm_xsave *xsave;
	struct kvm_msrs *msrs;
	struct kvm_nested_state *nested;
	int nested_bytes;
};

static int kvm;
static jmp_buf next_request;

static void fail(const char *format, ...)
{
	va_list arguments;

	printf("error ");
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n");
	longjmp(next_request, 1);
}

static long must(long result, const char *what)
{
	if (result < 0)
		fail("%s: %s", what, strerror(errno));
	return result;
}

#define IOCTL(fd, request, argument) \
	must(ioctl(fd, request, argument), #request)

static void *allocate(size_t bytes)
{
	void *memory = calloc(1, bytes);

	if (!memory)
		fail("out of memory");
	return memory;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static int open_fds(void)
{
	int fd, count = 0;

	for (fd = 0; fd < MAX_FDS; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void set_supported_cpuid(struct vm *vm)
{
	struct kvm_cpuid2 *cpuid;

	cpuid = allocate(sizeof(*cpuid) + MOST_LEAVES * sizeof(cpuid->entries[0]));
	cpuid->nent = MOST_LEAVES;
	IOCTL(kvm, KVM_GET_SUPPORTED_CPUID, cpuid);
	IOCTL(vm->vcpu, KVM_SET_CPUID2, cpuid);
	free(cpuid);
}

static void open_vm(struct vm *vm, int irqchip)
{
	memset(vm, 0, sizeof(*vm));
	vm->fd = IOCTL(kvm, KVM_CREATE_VM, 0);
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

static void close_vm(struct vm *vm)
{
	munmap(vm->run, vm->run_bytes);
	close(vm->vcpu);
	close(vm->fd);
	if (vm->memory)
		munmap(vm->memory, MEMORY_BYTES);
	free(vm->xsave);
	free(vm->msrs);
	free(vm->nested);
}

/* --- parts of a vCPU's state --- */

#define PLAIN_PART(part, GET, SET)						\
static void get_##part(struct vm *vm) { IOCTL(vm->vcpu, GET, &vm->part); }	\
static void set_##part(struct vm *vm) { IOCTL(vm->vcpu, SET, &vm->part); }	\
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

static uint64_t nested_bytes(struct vm *vm)
{
	return vm->nested->size;
}

/* The first MSRs of KVM's list that can be read and written back; the others are left out. */
static void prepare_msrs(struct vm *vm)
{
	struct kvm_msr_list *list, ask = { .nmsrs = 0 };
	struct kvm_msrs *one;
	uint32_t i;

	if (ioctl(kvm, KVM_GET_MSR_INDEX_LIST, &ask) == 0 || errno != E2BIG)
		fail("KVM_GET_MSR_INDEX_LIST: does not say how many there are");
	list = allocate(sizeof(*list) + ask.nmsrs * sizeof(list->indices[0]));
	list->nmsrs = ask.nmsrs;
	IOCTL(kvm, KVM_GET_MSR_INDEX_LIST, list);
	one = allocate(sizeof(*one) + sizeof(one->entries[0]));
	vm->msrs = allocate(sizeof(*one) + MOST_MSRS * sizeof(one->entries[0]));
	for (i = 0; i < list->nmsrs && vm->msrs->nmsrs < MOST_MSRS; i++) {
		one->nmsrs = 1;
		one->entries[0].index = list->indices[i];
		if (ioctl(vm->vcpu, KVM_GET_MSRS, one) == 1 &&
		    ioctl(vm->vcpu, KVM_SET_MSRS, one) == 1)
			vm->msrs->entries[vm->msrs->nmsrs++] = one->entries[0];
	}
	free(one);
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

static uint64_t msrs_bytes(struct vm *vm)
{
	return vm->msrs->nmsrs * sizeof(vm->msrs->entries[0]);
}

struct part {
	const char *name;
	void (*prepare)(struct vm *vm);
	void (*get)(struct vm *vm);
	void (*set)(struct vm *vm);
	uint64_t (*bytes)(struct vm *vm);
};

static const struct part all_parts[] = {
	{ "regs", NULL, get_regs, set_regs, regs_bytes },
	{ "sregs", NULL, get_sregs, set_sregs, sregs_bytes },
	{ "xcrs", NULL, get_xcrs, set_xcrs, xcrs_bytes },
	{ "debugregs", NULL, get_debugregs, set_debugregs, debugregs_bytes },
	{ "mp_state", NULL, get_mp_state, set_mp_state, mp_state_bytes },
	{ "events", NULL, get_events, set_events, events_bytes },
	{ "lapic", NULL, get_lapic, set_lapic, lapic_bytes },
	{ "xsave", prepare_xsave, get_xsave, set_xsave, xsave_bytes },
	{ "msrs", prepare_msrs, get_msrs, set_msrs, msrs_bytes },
	{ "nested", prepare_nested, get_nested, set_nested, nested_bytes },
};

static int find_parts(char *names, const struct part *found[])
{
	int count = 0;
	char *name;
	size_t i;

	for (name = strtok(names, ","); name; name = strtok(NULL, ",")) {
		for (i = 0; i < ARRAY_SIZE(all_parts); i++)
			if (!strcmp(all_parts[i].name, name))
				break;
		if (i == ARRAY_SIZE(all_parts) || count == ARRAY_SIZE(all_parts))
			fail("no part of the state is called %s", name);
		found[count++] = &all_parts[i];
	}
	return count;
}

/* --- the loops --- */

static struct result api_version(uint64_t count, char *parts)
{
	struct result result = { 0 };
	uint64_t start = now_ns();

	(void)parts;
	for (; result.done < count; result.done++)
		result.witness += IOCTL(kvm, KVM_GET_API_VERSION, 0);
	result.ns = now_ns() - start;
	return result;
}

static struct result check_extension(uint64_t count, char *parts)
{
	struct result result = { 0 };
	uint64_t start = now_ns();

	(void)parts;
	for (; result.done < count; result.done++)
		result.witness += IOCTL(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
	result.ns = now_ns() - start;
	return result;
}

static struct result state(uint64_t count, char *names, int set)
{
	void (*steps[ARRAY_SIZE(all_parts)])(struct vm *vm);
	const struct part *parts[ARRAY_SIZE(all_parts)];
	int i, n = find_parts(names, parts);
	struct result result = { 0 };
	struct vm vm;
	uint64_t start;

	open_vm(&vm, 1);
	for (i = 0; i < n; i++) {
		if (parts[i]->prepare)
			parts[i]->prepare(&vm);
		parts[i]->get(&vm);
		steps[i] = set ? parts[i]->set : parts[i]->get;
		result.witness += parts[i]->bytes(&vm);
	}
	start = now_ns();
	for (; result.done < count; result.done++)
		for (i = 0; i < n; i++)
			steps[i](&vm);
	result.ns = now_ns() - start;
	close_vm(&vm);
	return result;
}

static struct result get_state(uint64_t count, char *parts)
{
	return state(count, parts, 0);
}

static struct result set_state(uint64_t count, char *parts)
{
	return state(count, parts, 1);
}

/* Counts in EAX and writes AL to port 0xf0, for ever. */
static const uint8_t exit_loop[] = {
	0xff, 0xc0,		/* inc %eax */
	0xe6, 0xf0,		/* out %al, $0xf0 */
	0xeb, 0xfa,		/* jmp back */
};

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

static void load_exit_loop(struct vm *vm)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY_BYTES };
	char *memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		fail("mmap of guest memory: %s", strerror(errno));
	vm->memory = memory;
	*(uint64_t *)(memory + PML4_GPA) = PDPT_GPA | PTE_PRESENT_RW;
	*(uint64_t *)(memory + PDPT_GPA) = PD_GPA | PTE_PRESENT_RW;
	*(uint64_t *)(memory + PD_GPA) = PTE_PRESENT_RW | PDE_LARGE;
	memcpy(memory + CODE_GPA, exit_loop, sizeof(exit_loop));
	region.userspace_addr = (uintptr_t)memory;
	IOCTL(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
	enter_long_mode(vm);
}

static void run_to_port(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_RUN, 0);
	if (vm->run->exit_reason != KVM_EXIT_IO || vm->run->io.direction != KVM_EXIT_IO_OUT)
		fail("KVM_RUN: exit reason %u", vm->run->exit_reason);
}

static uint64_t guest_count(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_GET_REGS, &vm->regs);
	return vm->regs.rax;
}

static struct result run_exit(uint64_t count, char *parts)
{
	struct result result = { 0 };
	volatile uint8_t data;
	uint64_t before, start;
	struct vm vm;

	(void)parts;
	open_vm(&vm, 0);
	load_exit_loop(&vm);
	run_to_port(&vm);	/* what is touched first is mapped now */
	before = guest_count(&vm);
	start = now_ns();
	for (; result.done < count; result.done++) {
		run_to_port(&vm);
		data = *((uint8_t *)vm.run + vm.run->io.data_offset);
	}
	result.ns = now_ns() - start;
	(void)data;
	result.witness = guest_count(&vm) - before;
	close_vm(&vm);
	return result;
}

static struct result create_vm(uint64_t count, char *parts)
{
	struct result result = { 0 };
	int fds = open_fds();
	uint64_t start = now_ns();

	(void)parts;
	for (; result.done < count; result.done++)
		close(IOCTL(kvm, KVM_CREATE_VM, 0));
	result.ns = now_ns() - start;
	result.witness = open_fds() - fds;
	return result;
}

/* How many of the first vCPU ids are taken, as KVM says. */
static uint64_t taken_ids(int vm, uint64_t count)
{
	uint64_t id, taken = 0;

	for (id = 0; id < count; id++)
		taken += ioctl(vm, KVM_CREATE_VCPU, id) < 0 && errno == EEXIST;
	return taken;
}

static struct result create_vcpu(uint64_t count, char *parts)
{
	static void *runs[MAX_VCPUS];
	static int vcpus[MAX_VCPUS];
	struct result result = { 0 };
	int vm, run_bytes;
	uint64_t i, start;

	(void)parts;
	if (count > MAX_VCPUS)
		fail("%lu vCPUs are too many", (unsigned long)count);
	vm = IOCTL(kvm, KVM_CREATE_VM, 0);
	run_bytes = IOCTL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	start = now_ns();
	for (; result.done < count; result.done++) {
		int vcpu = IOCTL(vm, KVM_CREATE_VCPU, result.done);

		vcpus[result.done] = vcpu;
		runs[result.done] = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
					 vcpu, 0);
		if (runs[result.done] == MAP_FAILED)
			fail("mmap of a vCPU: %s", strerror(errno));
	}
	result.ns = now_ns() - start;
	result.witness = taken_ids(vm, count);
	for (i = 0; i < count; i++) {
		munmap(runs[i], run_bytes);
		close(vcpus[i]);
	}
	close(vm);
	return result;
}

static const struct {
	const char *name;
	struct result (*run)(uint64_t count, char *parts);
} loops[] = {
	{ "api_version", api_version },
	{ "check_extension", check_extension },
	{ "get_state", get_state },
	{ "set_state", set_state },
	{ "run_exit", run_exit },
	{ "create_vm", create_vm },
	{ "create_vcpu", create_vcpu },
};

static void serve(const char *line)
{
	char name[32], parts[256];
	struct result result;
	unsigned long count;
	size_t i;

	if (sscanf(line, "%31s %lu %255s", name, &count, parts) != 3)
		fail("a request is LOOP COUNT PARTS");
	for (i = 0; i < ARRAY_SIZE(loops); i++)
		if (!strcmp(loops[i].name, name))
			break;
	if (i == ARRAY_SIZE(loops))
		fail("no loop is called %s", name);
	result = loops[i].run(count, parts);
	printf("ok %lu %lu %lu\n", (unsigned long)result.done, (unsigned long)result.witness,
	       (unsigned long)result.ns);
}

int main(void)
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
		if (!setjmp(next_request))
			serve(line);
		alarm(0);
	}
	return 0;
}
