/* Exception entry, and the instructions of guest svme that C cannot express. */
#include "guest.h"
#include "registers.h"
#include "svme.h"
#include "tables.h"

	.macro	fixup_at insn, target	/* an exception at insn goes on at target */
	.pushsection .ex_table, "a"
	.quad	\insn, \target
	.popsection
	.endm

	.text
	.globl	wrmsr_safe
wrmsr_safe:			/* (%edi: msr, %rsi: value) */
	movl	%edi, %ecx
	movl	%esi, %eax
	movq	%rsi, %rdx
	shrq	$32, %rdx
1:	wrmsr
	movl	$1, %eax
	ret
2:	xorl	%eax, %eax
	ret
	fixup_at 1b, 2b

	.globl	vmrun
vmrun:				/* (%rdi: vmcb_pa); L2 leaves its own values in all but rax, rsp */
	push_preserved
	movq	%rdi, %rax
1:	vmrun	%rax
	movl	$1, %eax
2:	pop_preserved
	ret
3:	xorl	%eax, %eax
	jmp	2b
	fixup_at 1b, 3b

	.globl	exception_stubs
	.balign	EXCEPTION_STUB_SIZE
exception_stubs:
	.set	vector, 0
	.rept	32
	.balign	EXCEPTION_STUB_SIZE
	.if	!(EXCEPTIONS_WITH_ERROR_CODE >> vector & 1)
	pushq	$0
	.endif
	pushq	$vector
	jmp	exception_entry
	.set	vector, vector + 1
	.endr

exception_entry:		/* builds struct frame */
	push_registers
	movq	%rsp, %rdi
	cld
	call	handle_exception
	pop_registers
	addq	$16, %rsp
	iretq

	.data
	identity_tables npt	/* of their own, so that L1 could tell the walks apart */

	.section .note.GNU-stack, "", @progbits
