/* Start of the other CPUs: from real mode, by SIPI, into 64-bit mode. */
#include "guest.h"
#include "pc.h"

	.text
	.code16
	.globl	ap_start, ap_start_end
ap_start:			/* a copy of this runs at AP_START_GPA */
	cli
	cld
	lgdtl	%cs:(ap_gdt_pointer - ap_start)
	movl	%cr0, %eax
	orl	$CR0_PE, %eax
	movl	%eax, %cr0
	ljmpl	$PC_CS32, $ap_protected
ap_gdt_pointer:
	.word	ap_gdt_end - ap_gdt - 1
	.long	ap_gdt
ap_start_end:

	.code32
ap_protected:
	movl	$GDT_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
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
	ljmp	$GDT_CS64, $ap_long

	.code64
ap_long:
	movl	$1, %edi
	lock xaddl %edi, ap_next
	leaq	1(%rdi), %rsp
	imulq	$STACK_SIZE, %rsp, %rsp
	addq	$stacks, %rsp
	xorl	%ebp, %ebp
	call	ap_main
1:	hlt
	jmp	1b

	.data
	.balign	8
ap_gdt:
	.quad	0
	.quad	0x00af9b000000ffff	/* GDT_CS64 */
	.quad	0x00cf93000000ffff	/* GDT_DS */
	.quad	0x00cf9b000000ffff	/* PC_CS32 */
ap_gdt_end:
ap_next:
	.long	1

	.section .note.GNU-stack, "", @progbits
