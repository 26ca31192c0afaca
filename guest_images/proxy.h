/* The proxy, between its C and its assembly. */
#ifndef PROXY_H
#define PROXY_H

#include "guest.h"

#define VECTORS			256
#define STUB_SIZE		16
#define CODE_SLOT_SIZE		16
/* #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX (APM vol. 2, 8.2 Vectors) */
#define VECTORS_WITH_ERROR	0x60227d00

#ifndef __ASSEMBLER__

#include "svm.h"

struct trap {
	u64 r15, r14, r13, r12, r11, r10, r9, r8;
	u64 rdi, rsi, rbp, rbx, rdx, rcx, rax;
	u64 stub, vector, error, rip, cs, rflags, rsp, ss;
};

void proxy_main(struct proxy_instance *instance) __attribute__((noreturn));
void handle_trap(struct trap *trap);

/*
 * Calls code with the registers of instance->regs and puts back what it left there.
 * 1 if an exception ended it; then instance->fault says which. In proxy_entry.S.
 */
u64 call_code(struct proxy_instance *instance, u64 target);
/* The same at CPL 3. */
u64 call_user(struct proxy_instance *instance, u64 target);

/* proxy_entry.S: where call_* go on after an exception; code per instruction; IDT's target. */
extern char landing[], code_table[], trap_entry[], user_return[];

static inline void vmload(u64 vmcb_pa)
{
	asm volatile("vmload %0" : : "a"(vmcb_pa) : "memory");
}

static inline void vmsave(u64 vmcb_pa)
{
	asm volatile("vmsave %0" : : "a"(vmcb_pa) : "memory");
}

static inline void clgi(void)
{
	asm volatile("clgi" : : : "memory");
}

#endif
#endif
