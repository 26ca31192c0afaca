/*
 * Goes through what a PC has for an image that brings all else with it: multiboot
 * information, fw_cfg, CMOS, PIC, PIT, I/O APIC, local APICs, other CPUs. Prints a line
 * for each and ends with status 0; words of the command line ask for another end.
 */
#include "guest.h"
#include "pc.h"

#define TICKS		5
#define LOW_TOP		0x100000

extern u32 multiboot_info;
extern const u8 ap_start[], ap_start_end[];

void ap_main(void);

struct frame;

static struct idt_gate idt[256];
static volatile u32 pic_ticks, ioapic_ticks, timer_ticks, online = 1, answers, in_x2apic;

static void put(char c)
{
	while (!(inb(SERIAL_PORT + UART_LSR) & LSR_THR_EMPTY))
		pause();
	outb(SERIAL_PORT, c);
}

static void print(const char *text)
{
	for (; *text; text++)
		put(*text);
}

static void print_number(u64 value)
{
	if (value >= 10)
		print_number(value / 10);
	put('0' + value % 10);
}

static __attribute__((noreturn)) void finish(u32 status)
{
	asm volatile("outl %0, %w1" : : "a"(status), "Nd"(DEBUG_EXIT_PORT));
	for (;;)
		hlt();
}

static void check(int good, const char *what)
{
	print(what);
	print(good ? ": ok\n" : ": FAILED\n");
	if (!good)
		finish(1);
}

/* Local APIC, in either mode. */

static int is_x2apic(void)
{
	return !!(rdmsr(MSR_IA32_APICBASE) & APICBASE_X2APIC);
}

static void apic_write(u32 reg, u32 value)
{
	if (is_x2apic())
		wrmsr(X2APIC_MSR + reg / 16, value);
	else
		*(volatile u32 *)(APIC_GPA + reg) = value;
}

static void send_ipi(u32 apic_id, u32 icr)
{
	if (is_x2apic()) {
		wrmsr(X2APIC_MSR + APIC_ICR / 16, (u64)apic_id << 32 | icr);
		return;
	}
	*(volatile u32 *)(APIC_GPA + APIC_ICR_HIGH) = apic_id << 24;
	*(volatile u32 *)(APIC_GPA + APIC_ICR) = icr;
}

static void enable_x2apic(void)
{
	wrmsr(MSR_IA32_APICBASE, rdmsr(MSR_IA32_APICBASE) | APICBASE_X2APIC);
}

/* Interrupts */

#define HANDLER static __attribute__((interrupt)) void

HANDLER on_pic(struct frame *frame)
{
	(void)frame;
	pic_ticks++;
	outb(PIC_MASTER, PIC_EOI);
}

HANDLER on_ioapic(struct frame *frame)
{
	(void)frame;
	ioapic_ticks++;
	apic_write(APIC_EOI, 0);
}

HANDLER on_timer(struct frame *frame)
{
	(void)frame;
	timer_ticks++;
	apic_write(APIC_EOI, 0);
}

HANDLER on_ipi(struct frame *frame)
{
	(void)frame;
	__atomic_add_fetch(&answers, 1, __ATOMIC_SEQ_CST);
	apic_write(APIC_EOI, 0);
}

HANDLER on_x2apic(struct frame *frame)
{
	(void)frame;
	apic_write(APIC_EOI, 0);
	enable_x2apic();
	__atomic_add_fetch(&in_x2apic, 1, __ATOMIC_SEQ_CST);
}

HANDLER on_spurious(struct frame *frame)
{
	(void)frame;
}

HANDLER on_exception(struct frame *frame)
{
	(void)frame;
	check(0, "no exception");
}

static void set_gate(u32 vector, void *handler)
{
	u64 address = (u64)handler;

	idt[vector] = (struct idt_gate){
		.low = address, .middle = address >> 16, .high = address >> 32,
		.selector = GDT_CS64, .type = 0x8e,
	};
}

static void load_idt(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer = { sizeof(idt) - 1, (u64)idt };

	asm volatile("lidt %0" : : "m"(pointer));
}

static void set_up_interrupts(void)
{
	for (u32 i = 0; i < 32; i++)
		set_gate(i, on_exception);
	set_gate(VECTOR_PIC, on_pic);
	set_gate(VECTOR_IOAPIC, on_ioapic);
	set_gate(VECTOR_TIMER, on_timer);
	set_gate(VECTOR_IPI, on_ipi);
	set_gate(VECTOR_X2APIC, on_x2apic);
	set_gate(VECTOR_SPURIOUS, on_spurious);
	load_idt();
	apic_write(APIC_SPIV, SPIV_ENABLE | VECTOR_SPURIOUS);
}

/* Sleeps until a counter is high enough; looks at it with interrupts off, so none is missed. */
static void wait_for(volatile u32 *counter, u32 count)
{
	while (*counter < count) {
		asm volatile("sti; hlt; cli" : : : "memory");
	}
}

static void spin_for(volatile u32 *counter, u32 count)
{
	while (*counter < count)
		pause();
}

/* The checks */

static void check_serial(void)
{
	u8 seen;

	outb(SERIAL_PORT + UART_LCR, LCR_8_BITS);
	outb(SERIAL_PORT + UART_MCR, MCR_LOOP | MCR_DTR_RTS);
	outb(SERIAL_PORT, 0xae);
	seen = inb(SERIAL_PORT);
	outb(SERIAL_PORT + UART_MCR, MCR_DTR_RTS);
	check(seen == 0xae, "serial loop-back");
}

static void fw_cfg_select(u32 key)
{
	asm volatile("outw %w0, %w1" : : "a"(key), "Nd"(FW_CFG_SELECT));
}

static u64 fw_cfg_read(u32 size, int big_endian)
{
	u64 value = 0;

	for (u32 i = 0; i < size; i++) {
		u64 byte = inb(FW_CFG_DATA);

		value = big_endian ? value << 8 | byte : value | byte << 8 * i;
	}
	return value;
}

static u64 fw_cfg_number(u32 key, u32 size)
{
	fw_cfg_select(key);
	return fw_cfg_read(size, 0);
}

static int is_e820(const char *name)
{
	const char *wanted = "etc/e820";

	while (*wanted && *wanted == *name) {
		wanted++;
		name++;
	}
	return *wanted == *name;
}

/* Returns the selector of file etc/e820 and its size; selects nothing if there is none. */
static u32 find_e820_file(u32 *file_bytes)
{
	u32 count, found = 0;

	fw_cfg_select(FW_CFG_FILE_DIR);
	count = fw_cfg_read(4, 1);
	*file_bytes = 0;
	while (count--) {
		u32 bytes = fw_cfg_read(4, 1), key = fw_cfg_read(2, 1);
		char name[56];

		fw_cfg_read(2, 1);
		for (u32 i = 0; i < sizeof(name); i++)
			name[i] = inb(FW_CFG_DATA);
		if (is_e820(name)) {
			found = key;
			*file_bytes = bytes;
		}
	}
	return found;
}

static void check_memory(const struct multiboot_info *info, u64 ram_bytes)
{
	u64 at = info->mmap_addr, total = 0, top = 0;

	check((info->flags & (INFO_MEMORY | INFO_MMAP)) == (INFO_MEMORY | INFO_MMAP),
	      "multiboot memory information");
	while (at < info->mmap_addr + info->mmap_length) {
		const struct multiboot_mmap *entry = (void *)at;

		if (entry->type == MMAP_RAM)
			total += entry->length;
		if (entry->type == MMAP_RAM && entry->gpa == LOW_TOP)
			top = entry->gpa + entry->length;
		at += entry->size + sizeof(entry->size);
	}
	check(top == LOW_TOP + info->mem_upper * 1024ull, "mem_upper is the map's");
	/* Firmware keeps some for itself. */
	check(total <= ram_bytes && total + 2 * LOW_TOP > ram_bytes, "memory map");
	*(volatile u64 *)(top - 8) = at;
	check(*(volatile u64 *)(top - 8) == at, "the last word of low memory");
}

static void check_e820_file(void)
{
	u32 bytes, from_zero = 0;

	fw_cfg_select(find_e820_file(&bytes));
	for (u32 at = 0; at < bytes; at += 20) {
		u64 gpa = fw_cfg_read(8, 0), length = fw_cfg_read(8, 0);

		from_zero += fw_cfg_read(4, 0) == MMAP_RAM && !gpa && length;
	}
	check(from_zero == 1, "fw_cfg file etc/e820");
}

static u8 cmos(u8 index)
{
	outb(CMOS_INDEX, index);
	return inb(CMOS_DATA);
}

static void check_cmos(void)
{
	u8 seconds = cmos(CMOS_SECONDS);

	check((seconds & 0xf) < 10 && seconds < 0x60 && cmos(CMOS_STATUS_D) == CMOS_POWER_GOOD,
	      "cmos");
}

static void start_pit(void)
{
	outb(PIT_COMMAND, PIT_RATE_0);
	outb(PIT_CHANNEL_0, PIT_DIVISOR & 0xff);
	outb(PIT_CHANNEL_0, PIT_DIVISOR >> 8);
}

static void check_pic(void)
{
	static const u8 words[][2] = {
		{ 0x11, 0x11 }, { VECTOR_PIC, VECTOR_PIC + 8 }, { 4, 2 }, { 1, 1 }, { 0xfe, 0xff },
	};

	for (u32 i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
		outb(PIC_MASTER + !!i, words[i][0]);
		outb(PIC_SLAVE + !!i, words[i][1]);
	}
	apic_write(APIC_LVT_LINT0, LVT_EXTINT);
	start_pit();
	wait_for(&pic_ticks, TICKS);
	outb(PIC_MASTER + 1, 0xff);
	check(1, "PIT by PIC");
}

static void ioapic_write(u32 reg, u32 value)
{
	*(volatile u32 *)IOAPIC_GPA = reg;
	*(volatile u32 *)(IOAPIC_GPA + 0x10) = value;
}

static void check_ioapic(void)
{
	apic_write(APIC_LVT_LINT0, LVT_MASKED);
	ioapic_write(IOAPIC_REDIR + 2 * IOAPIC_IRQ0_PIN + 1, 0);
	ioapic_write(IOAPIC_REDIR + 2 * IOAPIC_IRQ0_PIN, VECTOR_IOAPIC);
	wait_for(&ioapic_ticks, TICKS);
	ioapic_write(IOAPIC_REDIR + 2 * IOAPIC_IRQ0_PIN, LVT_MASKED);
	check(1, "PIT by I/O APIC");
}

static void check_timer(void)
{
	apic_write(APIC_TIMER_DIVIDE, 0xb);	/* by 1 */
	apic_write(APIC_LVT_TIMER, LVT_PERIODIC | VECTOR_TIMER);
	apic_write(APIC_TIMER_COUNT, 1000000);
	wait_for(&timer_ticks, TICKS);
	apic_write(APIC_TIMER_COUNT, 0);
	apic_write(APIC_LVT_TIMER, LVT_MASKED);
	check(1, "APIC timer");
}

void ap_main(void)
{
	load_idt();
	apic_write(APIC_SPIV, SPIV_ENABLE | VECTOR_SPURIOUS);
	__atomic_add_fetch(&online, 1, __ATOMIC_SEQ_CST);
	for (;;)
		asm volatile("sti; hlt" : : : "memory");
}

static void start_cpus(u32 cpus)
{
	u8 *target = (u8 *)AP_START_GPA;

	if (cpus > MAX_VCPUS)
		check(0, "a stack for every CPU");
	for (const u8 *source = ap_start; source < ap_start_end; source++)
		*target++ = *source;
	send_ipi(0, ICR_ALL_BUT_SELF | ICR_INIT);
	send_ipi(0, ICR_ALL_BUT_SELF | ICR_STARTUP | SIPI_VECTOR);
	send_ipi(0, ICR_ALL_BUT_SELF | ICR_STARTUP | SIPI_VECTOR);
	spin_for(&online, cpus);
	print("CPUs online: ");
	print_number(online);
	print("\n");
}

static void check_ipis(u32 cpus)
{
	u32 a, b, c, d;

	for (u32 id = 1; id < cpus; id++)
		send_ipi(id, ICR_FIXED | VECTOR_IPI);
	spin_for(&answers, cpus - 1);
	cpuid(CPUID_LEAF_FEATURES, &a, &b, &c, &d);
	if (c & 1 << 21) {	/* x2APIC */
		send_ipi(0, ICR_ALL_BUT_SELF | ICR_FIXED | VECTOR_X2APIC);
		spin_for(&in_x2apic, cpus - 1);
		enable_x2apic();
	}
	for (u32 id = 1; id < cpus; id++)
		send_ipi(id, ICR_FIXED | VECTOR_IPI);
	spin_for(&answers, 2 * (cpus - 1));
	check(answers == 2 * (cpus - 1), "IPIs");
}

/* Returns the command line without its first word, the image's name. */
static const char *arguments(const struct multiboot_info *info)
{
	const char *text = (const char *)(u64)info->cmdline;

	if (!(info->flags & INFO_CMDLINE))
		return "";
	while (*text && *text != ' ')
		text++;
	while (*text == ' ')
		text++;
	return text;
}

static int starts_with(const char *text, const char *word)
{
	while (*word && *word == *text) {
		word++;
		text++;
	}
	return !*word;
}

static __attribute__((noreturn)) void end_as_told(const char *words)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) no_idt = { 0, 0 };
	u32 status = 0;

	if (starts_with(words, "hang"))
		asm volatile(".globl hang\nhang: jmp hang");
	if (starts_with(words, "halt"))
		for (;;)
			hlt();
	if (starts_with(words, "triple-fault"))
		asm volatile("lidt %0; ud2" : : "m"(no_idt));
	if (starts_with(words, "reset"))
		outb(0xcf9, 6);
	if (starts_with(words, "status="))
		for (words += 7; *words >= '0' && *words <= '9'; words++)
			status = 10 * status + *words - '0';
	finish(status);
}

void guest_main(u64 index)
{
	const struct multiboot_info *info = (void *)(u64)multiboot_info;
	u32 cpus = fw_cfg_number(FW_CFG_NB_CPUS, 2);
	u64 ram_bytes = fw_cfg_number(FW_CFG_RAM_SIZE, 8);

	if (index)
		finish(1);
	check_serial();
	check(!!info, "multiboot information");
	print("arguments: ");
	print(arguments(info));
	print("\n");
	check(fw_cfg_number(FW_CFG_SIGNATURE, 4) == 0x554d4551, "fw_cfg signature");
	print("memory MiB: ");
	print_number(ram_bytes >> 20);
	print("\n");
	check_memory(info, ram_bytes);
	check_e820_file();
	check_cmos();
	set_up_interrupts();
	check_pic();
	check_ioapic();
	check_timer();
	start_cpus(cpus);
	check_ipis(cpus);
	end_as_told(arguments(info));
}
