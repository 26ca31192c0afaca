/* Spins for ever on one instruction, without exits. */
#include "guest.h"

	.text
	.globl	guest_main, spin
guest_main:
spin:
	jmp	spin

	.section .note.GNU-stack, "", @progbits
