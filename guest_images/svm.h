/* SVM instructions, one function each. */
#ifndef SVM_H
#define SVM_H

#include "guest.h"

static inline void stgi(void)
{
	asm volatile("stgi" : : : "memory");
}

static inline void vmmcall(void)
{
	asm volatile("vmmcall" : : : "memory");
}

/* Runs L2 until #VMEXIT; 0 when VMRUN itself raised an exception. In svme_entry.S. */
u64 vmrun(u64 vmcb_pa);

/* WRMSR that survives an exception; 0 when it raised one. In svme_entry.S. */
u64 wrmsr_safe(u32 msr, u64 value);

#endif
