/* What every guest needs: port I/O, MSRs, CPUID. One instruction per function. */
#ifndef GUEST_H
#define GUEST_H

#include "guest_abi.h"

#define GDT_CS64	0x08
#define GDT_DS		0x10
#define STACK_SIZE	PAGE_SIZE

#ifndef __ASSEMBLER__

/* Entered once per vCPU, in 64-bit mode with interrupts off; never returns. */
void guest_main(u64 index) __attribute__((noreturn));

extern char identity_pml4[], npt_pml4[], image_start[], image_end[], stacks[];

static inline void outb(u32 port, u8 value)
{
	asm volatile("outb %0, %w1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 inb(u32 port)
{
	u8 value;

	asm volatile("inb %w1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline void pause(void)
{
	asm volatile("pause" : : : "memory");
}

static inline void hlt(void)
{
	asm volatile("hlt" : : : "memory");
}

static inline void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c, u32 *d)
{
	asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d)
		     : "a"(leaf), "c"(0));
}

static inline u64 rdmsr(u32 msr)
{
	u32 lo, hi;

	asm volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr));
	return (u64)hi << 32 | lo;
}

static inline void wrmsr(u32 msr, u64 value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((u32)value),
		     "d"((u32)(value >> 32)) : "memory");
}

#define read_cr(n) ({						\
	u64 value;						\
								\
	asm volatile("mov %%cr" #n ", %0" : "=r"(value));	\
	value;							\
})

#endif
#endif
