/* The proxy: entry, code of the instructions, calls that survive exceptions, traps. */
#include "proxy.h"
#include "registers.h"

#define MULTIBOOT_MAGIC	0x1badb002

	.section .multiboot, "a"
	.balign	4
	.long	MULTIBOOT_MAGIC, 0, -MULTIBOOT_MAGIC

	.text
	.code64
	.globl	entry64, entry32
entry64:			/* %rdi: the instance; stack and tables are set */
	cld
	xorl	%ebp, %ebp
	call	proxy_main

entry32:			/* a boot loader has no instance for a proxy */
	cli
	hlt
	jmp	entry32

	.macro	code_slot bytes:vararg
	.balign	CODE_SLOT_SIZE, 0xcc
	.byte	\bytes
	ret
	.endm

	.balign	CODE_SLOT_SIZE
	.globl	code_table
code_table:
	PROXY_CODE_TABLE

/* What both calls push: callee-saved registers, then instance and target. */
	.macro	enter_call
	push_preserved
	pushq	%rdi
	pushq	%rsi
	movq	%rsp, INSTANCE_LANDING_RSP(%rdi)
	movl	$1, INSTANCE_IN_OP(%rdi)
	.endm

	.macro	load_registers	/* from instance %rdi */
	leaq	INSTANCE_REGS(%rdi), %rax
	movq	GPRS_RBX(%rax), %rbx
	movq	GPRS_RCX(%rax), %rcx
	movq	GPRS_RDX(%rax), %rdx
	movq	GPRS_RSI(%rax), %rsi
	movq	GPRS_RDI(%rax), %rdi
	movq	GPRS_RBP(%rax), %rbp
	movq	GPRS_R8(%rax), %r8
	movq	GPRS_R9(%rax), %r9
	movq	GPRS_R10(%rax), %r10
	movq	GPRS_R11(%rax), %r11
	movq	GPRS_R12(%rax), %r12
	movq	GPRS_R13(%rax), %r13
	movq	GPRS_R14(%rax), %r14
	movq	GPRS_R15(%rax), %r15
	movq	GPRS_RAX(%rax), %rax
	.endm

	.globl	call_code
call_code:			/* (%rdi: instance, %rsi: target) */
	enter_call
	load_registers
	call	*(%rsp)
	pushq	%rax
	movq	16(%rsp), %rax
	leaq	INSTANCE_REGS(%rax), %rax
	popq	GPRS_RAX(%rax)
	movq	%rbx, GPRS_RBX(%rax)
	movq	%rcx, GPRS_RCX(%rax)
	movq	%rdx, GPRS_RDX(%rax)
	movq	%rsi, GPRS_RSI(%rax)
	movq	%rdi, GPRS_RDI(%rax)
	movq	%rbp, GPRS_RBP(%rax)
	movq	%r8, GPRS_R8(%rax)
	movq	%r9, GPRS_R9(%rax)
	movq	%r10, GPRS_R10(%rax)
	movq	%r11, GPRS_R11(%rax)
	movq	%r12, GPRS_R12(%rax)
	movq	%r13, GPRS_R13(%rax)
	movq	%r14, GPRS_R14(%rax)
	movq	%r15, GPRS_R15(%rax)
	movq	8(%rsp), %rdi
	movq	$0, INSTANCE_LANDING_STATUS(%rdi)

	.globl	landing
landing:			/* %rsp as after enter_call */
	cld
	movq	8(%rsp), %rdi
	movl	$0, INSTANCE_IN_OP(%rdi)
	movq	INSTANCE_LANDING_STATUS(%rdi), %rax
	addq	$16, %rsp
	pop_preserved
	ret

	.globl	call_user
call_user:			/* comes back through INT RETURN_VECTOR or an exception */
	enter_call
	leaq	PROXY_USER_STACK_TOP - 8(%rdi), %rax
	movq	$user_return, (%rax)
	pushq	$PROXY_GDT_USER_DS
	pushq	%rax
	pushfq
	pushq	$PROXY_GDT_USER_CS64
	pushq	%rsi
	load_registers
	iretq

	.globl	user_return
user_return:
	int	$PROXY_RETURN_VECTOR
	ud2

	.globl	trap_entry
trap_entry:			/* from a stub: its address, vector and error code are pushed */
	push_registers
	movq	%rsp, %rdi
	cld
	call	handle_trap
	pop_registers
	addq	$24, %rsp
	iretq

	.section .note.GNU-stack, "", @progbits
