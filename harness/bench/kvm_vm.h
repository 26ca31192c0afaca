/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the C sides of the benchmarks have in common: a VM with one vCPU and buffers for the parts
 * of its state, and a loop that answers requests.
 */
#ifndef KVM_VM_H
#define KVM_VM_H

#include <errno.h>
#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#ifndef KVM_CAP_SREGS2			/* headers before Linux 5.14 */
#define KVM_CAP_SREGS2		200
struct kvm_sregs2 {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	__u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs[4];
};
#define KVM_GET_SREGS2		_IOR(KVMIO, 0xcc, struct kvm_sregs2)
#define KVM_SET_SREGS2		_IOW(KVMIO, 0xcd, struct kvm_sregs2)
#endif

#define ARRAY_SIZE(a)		(sizeof(a) / sizeof((a)[0]))

#define DEADLINE_S		120	/* of one request; SIGALRM ends the process */
#define MOST_MSRS		255	/* msr_io() answers E2BIG to 256 and more */
#define MOST_LEAVES		256

#define PML4_GPA		0x2000
#define PDPT_GPA		0x3000
#define PD_GPA			0x4000
#define CODE_GPA		0xa000
#define TSS_GPA			0xfffbd000UL

#define PAGE_BYTES		4096UL
#define LARGE_PAGE_BYTES	(2UL << 20)

struct vm {
	int fd;
	int vcpu;
	char *memory;
	size_t memory_bytes;
	struct kvm_run *run;
	int run_bytes;
	int has_xsave2;
	size_t xsave_size;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_sregs2 sregs2;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	struct kvm_mp_state mp_state;
	struct kvm_vcpu_events events;
	struct kvm_lapic_state lapic;
	struct kvm_xsave *xsave;
	struct kvm_msrs *msrs;
	struct kvm_nested_state *nested;
	int nested_bytes;
	struct kvm_cpuid2 *cpuid;
};

/* A part of a vCPU's state; `prepare` may be NULL, the others may not. */
struct part {
	const char *name;
	void (*prepare)(struct vm *vm);
	void (*get)(struct vm *vm);
	void (*set)(struct vm *vm);
	void *(*data)(struct vm *vm);
	uint64_t (*bytes)(struct vm *vm);
};

#define PART_COUNT		10
extern const struct part all_parts[PART_COUNT];

extern int kvm;		/* /dev/kvm */

/* Answers the request with an error; ends the process too, unless the request is still a request. */
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
/* From now on nothing that fails in this thread can be made good. */
void fail_for_good(void);

long must(long result, const char *what);

#define IOCTL(fd, request, argument) \
	must(ioctl(fd, request, argument), #request)

void *allocate(size_t bytes);
uint64_t now_ns(void);

void open_vm(struct vm *vm, int irqchip);
void close_vm(struct vm *vm);
/* Gives the VM memory from address 0 up, and its vCPU code in 64-bit mode, all of it mapped. */
void load_code(struct vm *vm, size_t memory_bytes, const void *code, size_t code_bytes);
void add_memory(struct vm *vm, size_t memory_bytes);
void set_memory_flags(struct vm *vm, uint32_t flags);
/* Runs until the guest writes to a port. */
void run_to_port(struct vm *vm);
/* Have an MSR read and written with the others, if it can be. */
void keep_msr(struct vm *vm, uint32_t index);

/* Gives each line of the standard input to `serve`, which prints one line for it. */
int serve_requests(void (*serve)(const char *line));

#endif
