// SPDX-License-Identifier: GPL-2.0-only
/*
 * The C side of the migration benchmarks: the ioctls and copies of harness/migrate as a C program
 * would make them. No checksums and no formats: what is left is what a migration costs at least.
 *
 * Reads one request per line and answers each with "ok " and one line of JSON, or "error TEXT":
 *
 *	migrate LINK MIB DIRTY STRIDE
 *				moves a machine of MIB MiB of which DIRTY pages are left when it is
 *				paused, one every STRIDE pages; LINK is same_process (one thread,
 *				memcpy), threads or processes (over a socketpair), or tcp
 *	state COUNT [FILE]	takes the state of one vCPU and puts it into another, COUNT times; the
 *				first one has the state in the file, if one is named
 *
 * The source of a migration is used again by the next one. What fails while a machine moves ends
 * the process, after its line.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#include "kvm_vm.h"

#define BATCH_PAGES	256	/* of harness/migrate/memory_image.py */

/* The machine; as in migrate_load.py. */
#define FIRST_BYTE	(1UL << 20)
#define BLOCK_PAGES	32

#define PRESENT_OR_SWAPPED	(3ULL << 62)	/* Documentation/admin-guide/mm/pagemap.rst */

#define PREPARED 'p'
#define READY	'r'
#define COMMIT	'c'
#define RUNNING	'g'

/* Pages that follow one another. */
struct run {
	uint64_t first;
	uint64_t pages;
};

/* Runs on the link, at most BATCH_PAGES pages of them; 0 runs: that was all. */
struct batch {
	uint64_t count;
	uint64_t pages;
	struct run runs[BATCH_PAGES];
};

/* Of what is before the pages. */
static size_t batch_bytes(const struct batch *batch)
{
	return offsetof(struct batch, runs) + batch->count * sizeof(batch->runs[0]);
}

/* Where pages go: over a link, or into the memory of a machine in this process. */
struct way {
	int fd;
	struct vm *there;
	struct batch batch;
};

struct figures {
	uint64_t pages;
	uint64_t bytes;
	uint64_t round_ns;
	uint64_t rest_pages;
	uint64_t downtime_ns;
	uint64_t stopped_ns;	/* when */
	uint64_t state_ns;	/* the downtime's parts, as in live.py */
	uint64_t memory_ns;
	uint64_t stream_ns;
	uint64_t restore_ns;
	uint64_t commit_ns;
	uint64_t held_ns;	/* before it */
	uint64_t witness;	/* what the destination's memory holds */
	uint64_t expected;	/* what ours does */
};

/* Part of the VM's own state, and CPUID, which the destination has already unless it changed. */
struct vm_state {
	struct kvm_irqchip chips[3];
	struct kvm_clock_data clock;
	uint64_t leaves;
	struct kvm_cpuid_entry2 cpuid[MOST_LEAVES];
};

/* --- the link --- */

static void put(int fd, struct iovec *pieces, int count)
{
	while (count) {
		ssize_t done = must(writev(fd, pieces, count), "sending");

		for (; count && (size_t)done >= pieces->iov_len; pieces++, count--)
			done -= pieces->iov_len;
		if (count) {
			pieces->iov_base = (char *)pieces->iov_base + done;
			pieces->iov_len -= done;
		}
	}
}

static void put_bytes(int fd, const void *data, size_t bytes)
{
	struct iovec piece = { .iov_base = (void *)data, .iov_len = bytes };

	put(fd, &piece, 1);
}

static void take_all(int fd, struct iovec *pieces, int count)
{
	while (count) {
		ssize_t done = must(readv(fd, pieces, count), "receiving");

		if (!done)
			fail("the other end is gone");
		for (; count && (size_t)done >= pieces->iov_len; pieces++, count--)
			done -= pieces->iov_len;
		if (count) {
			pieces->iov_base = (char *)pieces->iov_base + done;
			pieces->iov_len -= done;
		}
	}
}

static void take(int fd, void *data, size_t bytes)
{
	struct iovec piece = { .iov_base = data, .iov_len = bytes };

	if (bytes)
		take_all(fd, &piece, 1);
}

static void say(int fd, char what)
{
	put_bytes(fd, &what, 1);
}

static void expect(int fd, char what)
{
	char said;

	take(fd, &said, 1);
	if (said != what)
		fail("the other end said %c where %c is due", said, what);
}

/* --- state --- */

/* MSRs with state that KVM_GET_MSR_INDEX_LIST may leave out: VM_CR and the MTRRs. */
static void keep_unlisted_msrs(struct vm *vm)
{
	static const uint32_t ranges[][2] = {
		{ 0xc0010114, 1 }, { 0x200, 16 }, { 0x250, 1 }, { 0x258, 2 }, { 0x268, 8 },
		{ 0x2ff, 1 },
	};
	uint32_t i, offset;

	for (i = 0; i < ARRAY_SIZE(ranges); i++)
		for (offset = 0; offset < ranges[i][1]; offset++)
			keep_msr(vm, ranges[i][0] + offset);
}

/* What the harness prefers, where it is offered. */
static void get_sregs2(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_GET_SREGS2, &vm->sregs2);
}

static void set_sregs2(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_SET_SREGS2, &vm->sregs2);
}

static void *sregs2_data(struct vm *vm)
{
	return &vm->sregs2;
}

static uint64_t sregs2_bytes(struct vm *vm)
{
	return sizeof(vm->sregs2);
}

static const struct part sregs2_part = {
	"sregs2", NULL, get_sregs2, set_sregs2, sregs2_data, sregs2_bytes,
};

static const struct part *best_part(struct vm *vm, const struct part *part)
{
	if (!strcmp(part->name, "sregs") &&
	    ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_SREGS2) > 0)
		return &sregs2_part;
	return part;
}

/* Which parts there are is the same at both ends: it is the same kernel. */
static int is_here(struct vm *vm, const struct part *part)
{
	return strcmp(part->name, "nested") ||
	       ioctl(vm->fd, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE) > 0;
}

static int prepare_parts(struct vm *vm, const struct part *parts[])
{
	int count = 0;
	size_t i;

	for (i = 0; i < PART_COUNT; i++) {
		if (!is_here(vm, &all_parts[i]))
			continue;
		if (all_parts[i].prepare)
			all_parts[i].prepare(vm);
		parts[count++] = best_part(vm, &all_parts[i]);
	}
	keep_unlisted_msrs(vm);
	return count;
}

static void capture(struct vm *vm, struct vm_state *state, const struct part *parts[], int count)
{
	uint32_t chip;
	int i;

	IOCTL(vm->vcpu, KVM_GET_CPUID2, vm->cpuid);
	state->leaves = vm->cpuid->nent;
	memcpy(state->cpuid, vm->cpuid->entries, state->leaves * sizeof(state->cpuid[0]));
	ioctl(vm->vcpu, KVM_GET_TSC_KHZ, 0);
	for (i = 0; i < count; i++)
		parts[i]->get(vm);
	for (chip = 0; chip < ARRAY_SIZE(state->chips); chip++) {
		state->chips[chip].chip_id = chip;
		IOCTL(vm->fd, KVM_GET_IRQCHIP, &state->chips[chip]);
	}
	IOCTL(vm->fd, KVM_GET_CLOCK, &state->clock);
}

/* CPUID can be set long before the rest: it hardly ever changes. */
static void set_cpuid(struct vm *vm, const struct vm_state *state)
{
	vm->cpuid->nent = state->leaves;
	memcpy(vm->cpuid->entries, state->cpuid, state->leaves * sizeof(state->cpuid[0]));
	IOCTL(vm->vcpu, KVM_SET_CPUID2, vm->cpuid);
	ioctl(vm->vcpu, KVM_GET_TSC_KHZ, 0);
}

static int has_cpuid(const struct vm *vm, const struct vm_state *state)
{
	return vm->cpuid->nent == state->leaves &&
	       !memcmp(vm->cpuid->entries, state->cpuid, state->leaves * sizeof(state->cpuid[0]));
}

static void restore(struct vm *vm, struct vm_state *state, const struct part *parts[], int count)
{
	struct kvm_clock_data clock = { .clock = state->clock.clock };
	uint32_t chip;
	int i;

	for (chip = 0; chip < ARRAY_SIZE(state->chips); chip++)
		IOCTL(vm->fd, KVM_SET_IRQCHIP, &state->chips[chip]);
	if (!has_cpuid(vm, state))
		set_cpuid(vm, state);
	for (i = 0; i < count; i++)
		parts[i]->set(vm);
	IOCTL(vm->fd, KVM_SET_CLOCK, &clock);
}

/* Nested state has as many bytes as it says, which the destination does not know yet. */
static size_t wire_bytes(struct vm *vm, const struct part *part)
{
	return strcmp(part->name, "nested") ? part->bytes(vm) : (size_t)vm->nested_bytes;
}

static void put_state(int fd, struct vm *vm, struct vm_state *state, const struct part *parts[],
		      int count)
{
	struct iovec pieces[PART_COUNT + 1] = { { state, sizeof(*state) } };
	int i;

	for (i = 0; i < count; i++)
		pieces[i + 1] = (struct iovec) { parts[i]->data(vm), wire_bytes(vm, parts[i]) };
	put(fd, pieces, count + 1);
}

static void take_state(int fd, struct vm *vm, struct vm_state *state, const struct part *parts[],
		       int count)
{
	int i;

	take(fd, state, sizeof(*state));
	for (i = 0; i < count; i++)
		take(fd, parts[i]->data(vm), wire_bytes(vm, parts[i]));
}

/* --- memory --- */

static uint64_t witness_of(struct vm *vm)
{
	uint64_t at, sum = 0;

	for (at = FIRST_BYTE; at < vm->memory_bytes; at += PAGE_BYTES)
		sum += *(volatile uint64_t *)(vm->memory + at);
	return sum;
}

static int is_zero(const char *page)
{
	return !*page && !memcmp(page, page + 1, PAGE_BYTES - 1);
}

static struct iovec pages_of(struct vm *vm, const struct run *run)
{
	return (struct iovec) {
		vm->memory + run->first * PAGE_BYTES, run->pages * PAGE_BYTES,
	};
}

static void put_batch(struct way *way, struct vm *vm, struct figures *figures)
{
	struct iovec pieces[1 + BATCH_PAGES];
	struct batch *batch = &way->batch;
	uint64_t i;

	if (!batch->count)
		return;
	pieces[0] = (struct iovec) { batch, batch_bytes(batch) };
	for (i = 0; i < batch->count; i++)
		pieces[1 + i] = pages_of(vm, &batch->runs[i]);
	figures->bytes += batch->pages * PAGE_BYTES + pieces[0].iov_len;
	if (!way->there)
		put(way->fd, pieces, 1 + batch->count);
	else
		for (i = 0; i < batch->count; i++)
			memcpy(pages_of(way->there, &batch->runs[i]).iov_base,
			       pieces[1 + i].iov_base, pieces[1 + i].iov_len);
	batch->count = batch->pages = 0;
}

/* Joins pages to runs and those to batches; a batch that is full is sent. */
static void add_page(struct way *way, struct vm *vm, uint64_t page, struct figures *figures)
{
	struct batch *batch = &way->batch;
	struct run *last;

	if (batch->pages == BATCH_PAGES)
		put_batch(way, vm, figures);
	last = &batch->runs[batch->count - 1];
	if (batch->count && page == last->first + last->pages)
		last->pages++;
	else
		batch->runs[batch->count++] = (struct run) { page, 1 };
	batch->pages++;
}

static void send_all(struct way *way, struct vm *vm, struct figures *figures)
{
	uint64_t page, pages = vm->memory_bytes / PAGE_BYTES;
	size_t bytes = pages * sizeof(uint64_t);
	uint64_t *entries = allocate(bytes);
	int pagemap = must(open("/proc/self/pagemap", O_RDONLY), "/proc/self/pagemap");

	if (pread(pagemap, entries, bytes, (uintptr_t)vm->memory / PAGE_BYTES * 8) != (ssize_t)bytes)
		fail("/proc/self/pagemap: cut off");
	close(pagemap);
	for (page = 0; page < pages; page++) {
		if (!(entries[page] & PRESENT_OR_SWAPPED) || is_zero(vm->memory + page * PAGE_BYTES))
			continue;
		add_page(way, vm, page, figures);
		figures->pages++;
	}
	put_batch(way, vm, figures);
	free(entries);
}

struct dirty {
	int manual;
	size_t bytes;
	uint64_t *now, *all;
};

static void track(struct vm *vm, struct dirty *dirty)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		.args = { KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE },
	};

	dirty->manual = ioctl(vm->fd, KVM_CHECK_EXTENSION, cap.cap) &
			KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
	dirty->bytes = (vm->memory_bytes / PAGE_BYTES + 63) / 64 * 8;
	dirty->now = allocate(dirty->bytes);
	dirty->all = allocate(dirty->bytes);
	if (dirty->manual)
		IOCTL(vm->fd, KVM_ENABLE_CAP, &cap);
	set_memory_flags(vm, KVM_MEM_LOG_DIRTY_PAGES);
}

static void untrack(struct vm *vm, struct dirty *dirty)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 };

	set_memory_flags(vm, 0);
	if (dirty->manual)
		IOCTL(vm->fd, KVM_ENABLE_CAP, &cap);
	free(dirty->now);
	free(dirty->all);
}

static void collect(struct vm *vm, struct dirty *dirty, int last)
{
	struct kvm_dirty_log log = { .dirty_bitmap = dirty->now };
	struct kvm_clear_dirty_log clear = {
		.num_pages = vm->memory_bytes / PAGE_BYTES, .dirty_bitmap = dirty->now,
	};
	uint64_t any = 0;
	size_t i;

	IOCTL(vm->fd, KVM_GET_DIRTY_LOG, &log);
	for (i = 0; i < dirty->bytes / 8; i++) {
		any |= dirty->now[i];
		dirty->all[i] |= dirty->now[i];
	}
	if (any && dirty->manual && !last)
		IOCTL(vm->fd, KVM_CLEAR_DIRTY_LOG, &clear);
}

static void send_dirty(struct way *way, struct vm *vm, struct dirty *dirty,
		       struct figures *figures)
{
	uint64_t word;
	size_t i;

	for (i = 0; i < dirty->bytes / 8; i++)
		for (word = dirty->all[i]; word; word &= word - 1) {
			add_page(way, vm, i * 64 + __builtin_ctzll(word), figures);
			figures->rest_pages++;
		}
	put_batch(way, vm, figures);
}

/* --- the destination --- */

struct destination {
	int fd;
	size_t memory_bytes;
};

static void take_memory(int fd, struct vm *vm)
{
	struct iovec pieces[BATCH_PAGES];
	struct batch batch;
	uint64_t i;

	for (;;) {
		take(fd, &batch, offsetof(struct batch, runs));
		if (!batch.count)
			return;
		if (batch.count > BATCH_PAGES)
			fail("%lu runs are too many", (unsigned long)batch.count);
		take(fd, batch.runs, batch.count * sizeof(batch.runs[0]));
		for (i = 0; i < batch.count; i++) {
			if ((batch.runs[i].first + batch.runs[i].pages) * PAGE_BYTES >
			    vm->memory_bytes)
				fail("pages outside memory");
			pieces[i] = pages_of(vm, &batch.runs[i]);
		}
		take_all(fd, pieces, batch.count);
	}
}

static void *receive(void *argument)
{
	struct destination *destination = argument;
	const struct part *parts[PART_COUNT];
	int fd = destination->fd, count;
	struct vm_state state, rehearsed;
	uint64_t witness;
	struct vm vm;

	fail_for_good();
	open_vm(&vm, 1);
	add_memory(&vm, destination->memory_bytes);
	count = prepare_parts(&vm, parts);
	say(fd, READY);
	take_memory(fd, &vm);
	take(fd, &state, sizeof(state));
	set_cpuid(&vm, &state);
	capture(&vm, &rehearsed, parts, count);
	say(fd, PREPARED);
	take_memory(fd, &vm);
	take_state(fd, &vm, &state, parts, count);
	restore(&vm, &state, parts, count);
	say(fd, READY);
	expect(fd, COMMIT);
	say(fd, RUNNING);
	witness = witness_of(&vm);
	put_bytes(fd, &witness, sizeof(witness));
	close_vm(&vm);
	close(fd);
	return NULL;
}

static void connect_tcp(int ends[2])
{
	struct sockaddr_in address = {
		.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	socklen_t bytes = sizeof(address);
	int one = 1, listening = must(socket(AF_INET, SOCK_STREAM, 0), "socket");

	must(bind(listening, (struct sockaddr *)&address, bytes), "bind");
	must(listen(listening, 1), "listen");
	must(getsockname(listening, (struct sockaddr *)&address, &bytes), "getsockname");
	ends[0] = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
	must(connect(ends[0], (struct sockaddr *)&address, bytes), "connect");
	ends[1] = must(accept(listening, NULL, NULL), "accept");
	setsockopt(ends[0], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(ends[1], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	close(listening);
}

static pid_t fork_destination(struct destination *destination, int source_fd)
{
	pid_t child = must(fork(), "fork");

	if (child) {
		close(destination->fd);
		return child;
	}
	fail_for_good();
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(DEADLINE_S);
	close(source_fd);
	/* The parent's KVM is for the parent's memory alone. */
	kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	receive(destination);
	_exit(0);
}

/* --- the source --- */

static struct vm source;
static const struct part *source_parts[PART_COUNT];
static int source_part_count;
static uint64_t source_dirty, source_stride;

/* Adds 1 to the first word of so many pages, writes to a port, and so on for ever. */
static void load_dirtying_guest(struct vm *vm, size_t memory_bytes, uint32_t dirty,
				uint32_t stride)
{
	uint8_t code[] = {
		0xbf, 0, 0, 0, 0,		/* mov $FIRST_BYTE, %edi */
		0xb9, 0, 0, 0, 0,		/* mov $dirty, %ecx */
		0xff, 0x07,			/* incl (%rdi) */
		0x81, 0xc7, 0, 0, 0, 0,		/* add $stride, %edi */
		0xff, 0xc9,			/* dec %ecx */
		0x75, 0xf4,			/* jnz to the incl */
		0xe6, 0xf0,			/* out %al, $0xf0 */
		0xeb, 0xe6,			/* jmp to the start */
	};
	uint32_t first = FIRST_BYTE;

	memcpy(code + 1, &first, 4);
	memcpy(code + 6, &dirty, 4);
	memcpy(code + 14, &stride, 4);
	load_code(vm, memory_bytes, code, sizeof(code));
}

static void fill(struct vm *vm)
{
	uint64_t page;

	for (page = FIRST_BYTE / PAGE_BYTES; page < vm->memory_bytes / PAGE_BYTES; page++) {
		char *at = vm->memory + page * PAGE_BYTES;

		if (page / BLOCK_PAGES % 2)
			continue;
		memset(at, 0x5a, PAGE_BYTES);
		*(uint64_t *)at = page;
	}
}

static void prepare_source(size_t memory_bytes, uint64_t dirty, uint64_t stride)
{
	if (source.memory && source.memory_bytes == memory_bytes && source_dirty == dirty &&
	    source_stride == stride)
		return;
	if (source.memory)
		close_vm(&source);
	if (FIRST_BYTE + dirty * stride > memory_bytes)
		fail("%lu pages are more than there are", (unsigned long)dirty);
	open_vm(&source, 1);
	source_part_count = prepare_parts(&source, source_parts);
	load_dirtying_guest(&source, memory_bytes, dirty, stride);
	/* Else a child would share it, and every write had to copy a page first. */
	madvise(source.memory, memory_bytes, MADV_DONTFORK);
	fill(&source);
	run_to_port(&source);	/* what is touched first is mapped now */
	source_dirty = dirty;
	source_stride = stride;
}

/* Ends the instruction that wrote to the port; without that its registers are of before. */
static void finish_io(struct vm *vm)
{
	vm->run->immediate_exit = 1;
	if (ioctl(vm->vcpu, KVM_RUN, 0) == 0 || errno != EINTR)
		fail("KVM_RUN: does not exit at once");
	vm->run->immediate_exit = 0;
}

static void copy_parts(struct vm *to, struct vm *from)
{
	int i;

	for (i = 0; i < source_part_count; i++)
		memcpy(source_parts[i]->data(to), source_parts[i]->data(from),
		       source_parts[i]->bytes(from));
}

static uint64_t lap_ns(uint64_t *last)
{
	uint64_t before = *last;

	*last = now_ns();
	return *last - before;
}

/* Sends all memory while the guest could run. */
static void send_first(struct way *way, struct figures *figures, struct dirty *dirty)
{
	uint64_t start;

	track(&source, dirty);
	start = now_ns();
	send_all(way, &source, figures);
	figures->round_ns = now_ns() - start;
	collect(&source, dirty, 0);
}

/* The state is taken once for the sake of CPUID, and of all that is done for the first time. */
static void rehearse(struct figures *figures, struct vm_state *state)
{
	uint64_t start = now_ns();

	finish_io(&source);
	capture(&source, state, source_parts, source_part_count);
	figures->held_ns = now_ns() - start;
}

/* Runs the guest until it stops; sends what is left of memory then. Returns the time of the end. */
static uint64_t send_rest(struct way *way, struct figures *figures, struct vm_state *state,
			  struct dirty *dirty)
{
	/* Like this the rest is not counted in the bytes of the round. */
	struct figures rest = { 0 };
	uint64_t last;

	collect(&source, dirty, 0);
	run_to_port(&source);
	figures->stopped_ns = last = now_ns();
	finish_io(&source);
	capture(&source, state, source_parts, source_part_count);
	figures->state_ns = lap_ns(&last);
	collect(&source, dirty, 1);
	send_dirty(way, &source, dirty, &rest);
	figures->rest_pages = rest.rest_pages;
	figures->memory_ns = lap_ns(&last);
	return last;
}

static void hand_over_by_link(int fd, struct figures *figures)
{
	struct way way = { .fd = fd };
	struct batch end = { 0 };
	struct vm_state state;
	struct dirty dirty;
	uint64_t last;

	expect(fd, READY);
	send_first(&way, figures, &dirty);
	rehearse(figures, &state);
	put_bytes(fd, &end, batch_bytes(&end));
	put_bytes(fd, &state, sizeof(state));
	expect(fd, PREPARED);
	last = send_rest(&way, figures, &state, &dirty);
	put_bytes(fd, &end, batch_bytes(&end));
	put_state(fd, &source, &state, source_parts, source_part_count);
	figures->stream_ns = lap_ns(&last);
	expect(fd, READY);
	figures->restore_ns = lap_ns(&last);
	say(fd, COMMIT);
	expect(fd, RUNNING);
	figures->commit_ns = lap_ns(&last);
	figures->downtime_ns = last - figures->stopped_ns;
	untrack(&source, &dirty);
	take(fd, &figures->witness, sizeof(figures->witness));
	figures->expected = witness_of(&source);
}

static void hand_over_here(struct figures *figures)
{
	struct vm_state state, rehearsed;
	const struct part *parts[PART_COUNT];
	struct dirty dirty;
	struct vm there;
	struct way way = { .there = &there };
	uint64_t last;

	open_vm(&there, 1);
	add_memory(&there, source.memory_bytes);
	prepare_parts(&there, parts);
	send_first(&way, figures, &dirty);
	rehearse(figures, &state);
	set_cpuid(&there, &state);
	capture(&there, &rehearsed, parts, source_part_count);
	last = send_rest(&way, figures, &state, &dirty);
	copy_parts(&there, &source);
	figures->stream_ns = lap_ns(&last);
	restore(&there, &state, parts, source_part_count);
	figures->restore_ns = lap_ns(&last);
	figures->downtime_ns = last - figures->stopped_ns;
	untrack(&source, &dirty);
	figures->witness = witness_of(&there);
	figures->expected = witness_of(&source);
	close_vm(&there);
}

static void await_destination(pid_t child, pthread_t thread)
{
	int status;

	if (!child)
		pthread_join(thread, NULL);
	else if (waitpid(child, &status, 0) != child || status)
		fail("the destination failed");
}

static void hand_over_there(const char *link, struct figures *figures)
{
	struct destination destination = { .memory_bytes = source.memory_bytes };
	pthread_t thread = 0;
	pid_t child = 0;
	int ends[2];

	if (!strcmp(link, "tcp"))
		connect_tcp(ends);
	else
		must(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	fail_for_good();
	destination.fd = ends[1];
	if (!strcmp(link, "threads"))
		must(-pthread_create(&thread, NULL, receive, &destination), "pthread_create");
	else
		child = fork_destination(&destination, ends[0]);
	hand_over_by_link(ends[0], figures);
	close(ends[0]);
	await_destination(child, thread);
}

static void migrate(const char *link, unsigned long mib, unsigned long dirty, unsigned long stride)
{
	struct figures figures = { 0 };
	int here = !strcmp(link, "same_process");

	if (!mib || mib > 1024 || !stride || stride > 1024)
		fail("%lu MiB are no machine for this", mib);
	if (!here && strcmp(link, "threads") && strcmp(link, "processes") && strcmp(link, "tcp"))
		fail("no link is called %s", link);
	prepare_source(mib << 20, dirty, stride * PAGE_BYTES);
	if (here)
		hand_over_here(&figures);
	else
		hand_over_there(link, &figures);
	if (figures.witness != figures.expected)
		fail("the destination has other memory than the source");
	printf("ok {\"pages\": %lu, \"size_bytes\": %lu, \"round_ns\": %lu, \"rest_pages\": %lu, "
	       "\"downtime_ns\": %lu, \"parts_ns\": {\"state\": %lu, \"memory\": %lu, "
	       "\"stream\": %lu, \"restore\": %lu, \"commit\": %lu}, \"held_ns\": %lu}\n",
	       figures.pages, figures.bytes, figures.round_ns, figures.rest_pages,
	       figures.downtime_ns, figures.state_ns, figures.memory_ns, figures.stream_ns,
	       figures.restore_ns, figures.commit_ns, figures.held_ns);
}

/* --- a state that somebody else has taken --- */

/* Before each part in a file; the file has as many as it likes. */
struct part_header {
	char name[16];
	uint64_t bytes;
};

static void take_part(struct vm *vm, struct vm_state *state, const struct part_header *header,
		      const void *data, const struct part *parts[], int count)
{
	static const char *const chips[] = { "pic_master", "pic_slave", "ioapic" };
	const struct kvm_msr_entry *entry = data;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(chips); i++)
		if (!strcmp(header->name, chips[i]) && header->bytes == sizeof(state->chips[i]))
			memcpy(&state->chips[i], data, header->bytes);
	if (!strcmp(header->name, "clock") && header->bytes == sizeof(state->clock))
		memcpy(&state->clock, data, header->bytes);
	if (!strcmp(header->name, "msrs"))
		for (i = 0; i < header->bytes / sizeof(*entry); i++, entry++) {
			keep_msr(vm, entry->index);
			if (vm->msrs->nmsrs &&
			    vm->msrs->entries[vm->msrs->nmsrs - 1].index == entry->index)
				vm->msrs->entries[vm->msrs->nmsrs - 1].data = entry->data;
		}
	for (i = 0; i < (size_t)count; i++) {
		int same = !strcmp(header->name, parts[i]->name) ||
			   (!strcmp(header->name, "sregs") && parts[i] == &sregs2_part);

		if (!same || !strcmp(header->name, "msrs"))
			continue;
		if (header->bytes > parts[i]->bytes(vm) && strcmp(header->name, "nested"))
			fail("%s: %lu bytes are too many", header->name,
			     (unsigned long)header->bytes);
		if (!strcmp(header->name, "nested") && header->bytes > (size_t)vm->nested_bytes)
			fail("nested: too long");
		memcpy(parts[i]->data(vm), data, header->bytes);
	}
}

/* The MSRs that there are depend on CPUID, so that comes first. */
static void load_state(struct vm *vm, struct vm_state *state, const char *path,
		       const struct part *parts[], int count)
{
	FILE *file = fopen(path, "r");
	struct part_header header;
	static char data[1 << 17];

	if (!file)
		fail("%s: %s", path, strerror(errno));
	memset(state, 0, sizeof(*state));
	vm->msrs->nmsrs = 0;
	while (fread(&header, sizeof(header), 1, file) == 1) {
		header.name[sizeof(header.name) - 1] = 0;
		if (header.bytes > sizeof(data) ||
		    (header.bytes && fread(data, header.bytes, 1, file) != 1))
			fail("%s: %s is cut off", path, header.name);
		if (strcmp(header.name, "cpuid")) {
			take_part(vm, state, &header, data, parts, count);
			continue;
		}
		state->leaves = header.bytes / sizeof(state->cpuid[0]);
		if (state->leaves > MOST_LEAVES)
			fail("%s: too many leaves", path);
		memcpy(state->cpuid, data, header.bytes);
		set_cpuid(vm, state);
	}
	fclose(file);
}

/* The state of a plain vCPU, or with a path the one in that file. */
static void state_loop(unsigned long count, const char *path)
{
	const struct part *parts[PART_COUNT];
	struct vm_state state;
	uint64_t start, bytes = 0;
	unsigned long done;
	struct vm one, other;
	unsigned int flags, smm;
	int i, n;

	open_vm(&one, 1);
	open_vm(&other, 1);
	n = prepare_parts(&one, parts);
	prepare_parts(&other, parts);
	if (path) {
		load_state(&one, &state, path, parts, n);
		set_cpuid(&other, &state);
		memcpy(other.msrs, one.msrs,
		       sizeof(*one.msrs) + one.msrs->nmsrs * sizeof(one.msrs->entries[0]));
		restore(&one, &state, parts, n);
	}
	start = now_ns();
	for (done = 0; done < count; done++) {
		capture(&one, &state, parts, n);
		for (i = 0; i < n; i++)
			memcpy(parts[i]->data(&other), parts[i]->data(&one), parts[i]->bytes(&one));
		restore(&other, &state, parts, n);
	}
	start = now_ns() - start;
	/* What it is, to be compared with what it should be. */
	capture(&other, &state, parts, n);
	flags = other.nested ? other.nested->flags : 0;
	smm = other.events.smi.smm;
	for (i = 0; i < n; i++)
		bytes += parts[i]->bytes(&other);
	close_vm(&one);
	close_vm(&other);
	printf("ok {\"done\": %lu, \"size_bytes\": %lu, \"ns\": %lu, \"nested_flags\": %u, "
	       "\"smm\": %u}\n", done, bytes, start, flags, smm);
}

static void serve(const char *line)
{
	unsigned long mib, dirty, stride, count;
	char link[32], path[256];

	if (sscanf(line, "migrate %31s %lu %lu %lu", link, &mib, &dirty, &stride) == 4)
		migrate(link, mib, dirty, stride);
	else if (sscanf(line, "state %lu %255s", &count, path) == 2)
		state_loop(count, path);
	else if (sscanf(line, "state %lu", &count) == 1)
		state_loop(count, NULL);
	else
		fail("a request is migrate LINK MIB DIRTY STRIDE, or state COUNT [FILE]");
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	return serve_requests(serve);
}
