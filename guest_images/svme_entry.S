/* Exception entry, and the instructions of guest svme that C cannot express. */
#include "guest.h"
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
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rdi, %rax
1:	vmrun	%rax
	movl	$1, %eax
2:	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
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
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	pushq	%rbx
	pushq	%rbp
	pushq	%rsi
	pushq	%rdi
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, %rdi
	cld
	call	handle_exception
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rdi
	popq	%rsi
	popq	%rbp
	popq	%rbx
	popq	%rdx
	popq	%rcx
	popq	%rax
	addq	$16, %rsp
	iretq

	.data
	identity_tables npt	/* of their own, so that L1 could tell the walks apart */

	.section .note.GNU-stack, "", @progbits
