/* For assembly: long-mode page tables that map the low 4 GiB to themselves. */
#ifndef TABLES_H
#define TABLES_H

/*
 * Present, writable, user (nested walks count as user accesses), accessed and
 * dirty: no walk ever has to write to a table.
 */
#define TABLE_FLAGS	0x27
#define LARGE_FLAGS	0xe7
#define LARGE_SIZE	0x200000
#define TABLE_ENTRIES	512
#define LARGE_PAGES	(4 * TABLE_ENTRIES)

	.macro	identity_tables name
	.balign	PAGE_SIZE
	.globl	\name\()_pml4
\name\()_pml4:
	.quad	\name\()_pdpt + TABLE_FLAGS
	.fill	TABLE_ENTRIES - 1, 8, 0
\name\()_pdpt:
	.quad	\name\()_pd + TABLE_FLAGS
	.quad	\name\()_pd + PAGE_SIZE + TABLE_FLAGS
	.quad	\name\()_pd + 2 * PAGE_SIZE + TABLE_FLAGS
	.quad	\name\()_pd + 3 * PAGE_SIZE + TABLE_FLAGS
	.fill	TABLE_ENTRIES - 4, 8, 0
\name\()_pd:
	.set	large, 0
	.rept	LARGE_PAGES
	.quad	large + LARGE_FLAGS
	.set	large, large + LARGE_SIZE
	.endr
	.endm

#endif
