/*
 * Start of the SMI handler: copied to SMBASE + PROXY_SMM_ENTRY, which is an
 * instance. CS has the base SMBASE; the data segments are flat.
 */
#include "proxy.h"

#define GDT_LIMIT	0xff

	.section .rodata
	.globl	smm_start, smm_end, smm_base, smm_gdt_base, smm_far_offset
	.code16
smm_start:
	cli
	lgdtl	%cs:(PROXY_SMM_ENTRY + smm_gdt - smm_start)
	movl	%cs:INSTANCE_CR4, %eax
	movl	%eax, %cr4
	movl	%cs:INSTANCE_CR3, %eax
	movl	%eax, %cr3
	movl	%cs:INSTANCE_EFER, %eax
	xorl	%edx, %edx
	movl	$MSR_EFER, %ecx
	wrmsr
	movl	%cs:INSTANCE_CR0, %eax
	movl	%eax, %cr0
	.byte	0x66, 0xea	/* ljmpl, to the address that is filled in */
smm_far_offset:
	.long	0
	.word	PROXY_GDT_CS64

	.code64
smm_long_mode:
	movl	$PROXY_GDT_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	xorl	%eax, %eax
	movl	%eax, %fs
	movl	%eax, %gs
	movl	smm_base(%rip), %edi
	leaq	PROXY_STACK_TOP(%rdi), %rsp
	/* Every entry finds the TSS busy from the one before. */
	andb	$0xfd, PROXY_TABLES_OFFSET + PROXY_GDT_TSS + 5(%rdi)
	movl	$PROXY_GDT_TSS, %eax
	ltr	%ax
	movl	$entry64, %eax
	jmp	*%rax

	.balign	4
smm_gdt:
	.word	GDT_LIMIT
smm_gdt_base:
	.long	0
	.balign	4
smm_base:
	.long	0
smm_end:
	.globl	smm_long_mode

	.section .note.GNU-stack, "", @progbits
