/* Entry points, page tables and descriptor table of every guest. */
#include "guest.h"
#include "tables.h"

#define MULTIBOOT_MAGIC	0x1badb002
#define MULTIBOOT_FLAGS	0

	.macro	set_stack	/* to the end of stacks[%rdi] */
	leaq	1(%rdi), %rsp
	imulq	$STACK_SIZE, %rsp, %rsp
	addq	$stacks, %rsp
	.endm

	.section .multiboot, "a"
	.balign	4
	.long	MULTIBOOT_MAGIC
	.long	MULTIBOOT_FLAGS
	.long	-(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

	.text
	.code32
	.globl	entry32
entry32:			/* multiboot: protected mode, one vCPU */
	cli
	cld
	movl	%ebx, multiboot_info
	lgdt	gdt_pointer
	movl	$CR4_PAE, %eax
	movl	%eax, %cr4
	movl	$identity_pml4, %eax
	movl	%eax, %cr3
	movl	$MSR_EFER, %ecx
	xorl	%edx, %edx
	movl	$EFER_LME, %eax
	wrmsr
	movl	$(CR0_PG | CR0_ET | CR0_NE | CR0_PE), %eax
	movl	%eax, %cr0
	xorl	%edi, %edi
	ljmp	$GDT_CS64, $entered

	.code64
	.globl	entry64
entry64:			/* 64-bit mode, %rdi: index of the vCPU */
	cli
	cld
	cmpq	$MAX_VCPUS, %rdi
	jae	no_such_vcpu
	lgdt	gdt_pointer
	movl	$identity_pml4, %eax
	movq	%rax, %cr3
	set_stack
	pushq	$GDT_CS64
	pushq	$entered
	lretq

entered:
	movl	$GDT_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	xorl	%eax, %eax
	movl	%eax, %fs
	movl	%eax, %gs
	set_stack
	xorl	%ebp, %ebp
	call	guest_main
no_such_vcpu:
	hlt
	jmp	no_such_vcpu

	.data
	identity_tables identity

	.balign	8
gdt:
	.quad	0
	.quad	0x00af9b000000ffff	/* GDT_CS64, accessed already */
	.quad	0x00cf93000000ffff	/* GDT_DS, accessed already */
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.quad	gdt

	.balign	4
	.globl	multiboot_info
multiboot_info:			/* 0: not entered by a multiboot loader */
	.long	0

	.bss
	.balign	PAGE_SIZE
	.globl	stacks
stacks:
	.skip	MAX_VCPUS * STACK_SIZE

	.section .note.GNU-stack, "", @progbits
