/* Prints one line on the serial port and ends the machine with a status. */
#include "guest.h"

#define LSR		5
#define LSR_THR_EMPTY	0x20

static void print(const char *text)
{
	for (; *text; text++) {
		while (!(inb(SERIAL_PORT + LSR) & LSR_THR_EMPTY))
			pause();
		outb(SERIAL_PORT, *text);
	}
}

void guest_main(u64 index)
{
	(void)index;
	print(HELLO_TEXT);
	outb(DEBUG_EXIT_PORT, HELLO_STATUS);
	for (;;)
		hlt();
}
