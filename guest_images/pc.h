/* The devices of a PC that guest `pc` talks to. */
#ifndef PC_H
#define PC_H

#define PC_CS32		0x18	/* in the table that APs start with */
#define AP_START_GPA	0x10000
#define SIPI_VECTOR	(AP_START_GPA >> 12)

#ifndef __ASSEMBLER__

/* Interrupt vectors. */
enum {
	VECTOR_PIC	= 0x20,	/* IRQ 0, by the PIC */
	VECTOR_IOAPIC	= 0x30,	/* IRQ 0, by the I/O APIC */
	VECTOR_TIMER	= 0x40,	/* of the local APIC */
	VECTOR_IPI	= 0x50,
	VECTOR_X2APIC	= 0x51,	/* makes an AP go over to x2APIC mode */
	VECTOR_SPURIOUS	= 0xff,
};

/* Serial port: 8250 registers. */
#define UART_LCR	3
#define UART_MCR	4
#define UART_LSR	5
#define LCR_8_BITS	0x03
#define MCR_DTR_RTS	0x03
#define MCR_LOOP	0x10
#define LSR_THR_EMPTY	0x20

/* fw_cfg */
#define FW_CFG_SELECT	0x510
#define FW_CFG_DATA	0x511
#define FW_CFG_SIGNATURE 0x00
#define FW_CFG_RAM_SIZE	0x03
#define FW_CFG_NB_CPUS	0x05
#define FW_CFG_FILE_DIR	0x19

/* PIC, PIT, CMOS */
#define PIC_MASTER	0x20
#define PIC_SLAVE	0xa0
#define PIC_EOI		0x20
#define PIT_CHANNEL_0	0x40
#define PIT_COMMAND	0x43
#define PIT_RATE_0	0x34	/* channel 0, low byte then high, mode 2 */
#define PIT_DIVISOR	1193	/* 1 kHz */
#define CMOS_INDEX	0x70
#define CMOS_DATA	0x71
#define CMOS_SECONDS	0x00
#define CMOS_STATUS_D	0x0d
#define CMOS_POWER_GOOD	0x80

/* Local APIC; in x2APIC mode register r is MSR X2APIC_MSR + r / 16. */
#define APIC_GPA	0xfee00000ull
#define APIC_EOI	0x0b0
#define APIC_SPIV	0x0f0
#define APIC_ICR	0x300
#define APIC_ICR_HIGH	0x310
#define APIC_LVT_TIMER	0x320
#define APIC_LVT_LINT0	0x350
#define APIC_TIMER_COUNT 0x380
#define APIC_TIMER_DIVIDE 0x3e0
#define SPIV_ENABLE	0x100
#define LVT_MASKED	0x10000
#define LVT_PERIODIC	0x20000
#define LVT_EXTINT	0x700
#define ICR_INIT	0x4500	/* asserted */
#define ICR_STARTUP	0x4600
#define ICR_FIXED	0x4000
#define ICR_ALL_BUT_SELF 0xc0000
#define X2APIC_MSR	0x800
#define APICBASE_X2APIC	(1 << 10)

#define IOAPIC_GPA	0xfec00000ull
#define IOAPIC_IRQ0_PIN	2	/* where every PC wires IRQ 0 to */
#define IOAPIC_REDIR	0x10

struct idt_gate {
	u16 low, selector;
	u8 ist, type;
	u16 middle;
	u32 high, zero;
};

/* What multiboot loaders hand over; only what is used here. */
struct multiboot_info {
	u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr;
	u32 syms[4];
	u32 mmap_length, mmap_addr;
};

#define INFO_MEMORY	(1 << 0)
#define INFO_CMDLINE	(1 << 2)
#define INFO_MMAP	(1 << 6)

struct multiboot_mmap {
	u32 size;
	u64 gpa, length;
	u32 type;
} __attribute__((packed));

#define MMAP_RAM	1

#endif
#endif
