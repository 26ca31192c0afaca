// SPDX-License-Identifier: GPL-2.0-only
/*
 * The C side of the ioctl benchmarks: the loops of loops.py as a C program would write them, with
 * sizes asked for once and buffers used again.
 *
 * Reads one request per line, "LOOP COUNT PARTS" (parts separated by commas, or "-"), and answers
 * each with one line: "ok DONE WITNESS NANOSECONDS" or "error TEXT". DONE is how many rounds of
 * the loop went well, WITNESS a number that the kernel gave and that shows what was done; both must
 * be the same on the Python side. Only the loop itself is timed.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm_vm.h"

#define MAX_FDS			4096
#define MAX_VCPUS		512
#define EXIT_LOOP_MEMORY_BYTES	0x10000

struct result {
	uint64_t done;
	uint64_t witness;
	uint64_t ns;
};

static int open_fds(void)
{
	int fd, count = 0;

	for (fd = 0; fd < MAX_FDS; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static int find_parts(char *names, const struct part *found[])
{
	int count = 0;
	char *name;
	size_t i;

	for (name = strtok(names, ","); name; name = strtok(NULL, ",")) {
		for (i = 0; i < ARRAY_SIZE(all_parts); i++)
			if (!strcmp(all_parts[i].name, name))
				break;
		if (i == ARRAY_SIZE(all_parts) || count == ARRAY_SIZE(all_parts))
			fail("no part of the state is called %s", name);
		found[count++] = &all_parts[i];
	}
	return count;
}

/* --- the loops --- */

static struct result api_version(uint64_t count, char *parts)
{
	struct result result = { 0 };
	uint64_t start = now_ns();

	(void)parts;
	for (; result.done < count; result.done++)
		result.witness += IOCTL(kvm, KVM_GET_API_VERSION, 0);
	result.ns = now_ns() - start;
	return result;
}

static struct result check_extension(uint64_t count, char *parts)
{
	struct result result = { 0 };
	uint64_t start = now_ns();

	(void)parts;
	for (; result.done < count; result.done++)
		result.witness += IOCTL(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
	result.ns = now_ns() - start;
	return result;
}

static struct result state(uint64_t count, char *names, int set)
{
	void (*steps[ARRAY_SIZE(all_parts)])(struct vm *vm);
	const struct part *parts[ARRAY_SIZE(all_parts)];
	int i, n = find_parts(names, parts);
	struct result result = { 0 };
	struct vm vm;
	uint64_t start;

	open_vm(&vm, 1);
	for (i = 0; i < n; i++) {
		if (parts[i]->prepare)
			parts[i]->prepare(&vm);
		parts[i]->get(&vm);
		steps[i] = set ? parts[i]->set : parts[i]->get;
		result.witness += parts[i]->bytes(&vm);
	}
	start = now_ns();
	for (; result.done < count; result.done++)
		for (i = 0; i < n; i++)
			steps[i](&vm);
	result.ns = now_ns() - start;
	close_vm(&vm);
	return result;
}

static struct result get_state(uint64_t count, char *parts)
{
	return state(count, parts, 0);
}

static struct result set_state(uint64_t count, char *parts)
{
	return state(count, parts, 1);
}

/* Counts in EAX and writes AL to port 0xf0, for ever. */
static const uint8_t exit_loop[] = {
	0xff, 0xc0,		/* inc %eax */
	0xe6, 0xf0,		/* out %al, $0xf0 */
	0xeb, 0xfa,		/* jmp back */
};

static uint64_t guest_count(struct vm *vm)
{
	IOCTL(vm->vcpu, KVM_GET_REGS, &vm->regs);
	return vm->regs.rax;
}

static struct result run_exit(uint64_t count, char *parts)
{
	struct result result = { 0 };
	volatile uint8_t data;
	uint64_t before, start;
	struct vm vm;

	(void)parts;
	open_vm(&vm, 0);
	load_code(&vm, EXIT_LOOP_MEMORY_BYTES, exit_loop, sizeof(exit_loop));
	run_to_port(&vm);	/* what is touched first is mapped now */
	before = guest_count(&vm);
	start = now_ns();
	for (; result.done < count; result.done++) {
		run_to_port(&vm);
		data = *((uint8_t *)vm.run + vm.run->io.data_offset);
	}
	result.ns = now_ns() - start;
	(void)data;
	result.witness = guest_count(&vm) - before;
	close_vm(&vm);
	return result;
}

static struct result create_vm(uint64_t count, char *parts)
{
	struct result result = { 0 };
	int fds = open_fds();
	uint64_t start = now_ns();

	(void)parts;
	for (; result.done < count; result.done++)
		close(IOCTL(kvm, KVM_CREATE_VM, 0));
	result.ns = now_ns() - start;
	result.witness = open_fds() - fds;
	return result;
}

/* How many of the first vCPU ids are taken, as KVM says. */
static uint64_t taken_ids(int vm, uint64_t count)
{
	uint64_t id, taken = 0;

	for (id = 0; id < count; id++)
		taken += ioctl(vm, KVM_CREATE_VCPU, id) < 0 && errno == EEXIST;
	return taken;
}

static struct result create_vcpu(uint64_t count, char *parts)
{
	static void *runs[MAX_VCPUS];
	static int vcpus[MAX_VCPUS];
	struct result result = { 0 };
	int vm, run_bytes;
	uint64_t i, start;

	(void)parts;
	if (count > MAX_VCPUS)
		fail("%lu vCPUs are too many", (unsigned long)count);
	vm = IOCTL(kvm, KVM_CREATE_VM, 0);
	run_bytes = IOCTL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	start = now_ns();
	for (; result.done < count; result.done++) {
		int vcpu = IOCTL(vm, KVM_CREATE_VCPU, result.done);

		vcpus[result.done] = vcpu;
		runs[result.done] = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
					 vcpu, 0);
		if (runs[result.done] == MAP_FAILED)
			fail("mmap of a vCPU: %s", strerror(errno));
	}
	result.ns = now_ns() - start;
	result.witness = taken_ids(vm, count);
	for (i = 0; i < count; i++) {
		munmap(runs[i], run_bytes);
		close(vcpus[i]);
	}
	close(vm);
	return result;
}

static const struct {
	const char *name;
	struct result (*run)(uint64_t count, char *parts);
} loops[] = {
	{ "api_version", api_version },
	{ "check_extension", check_extension },
	{ "get_state", get_state },
	{ "set_state", set_state },
	{ "run_exit", run_exit },
	{ "create_vm", create_vm },
	{ "create_vcpu", create_vcpu },
};

static void serve(const char *line)
{
	char name[32], parts[256];
	struct result result;
	unsigned long count;
	size_t i;

	if (sscanf(line, "%31s %lu %255s", name, &count, parts) != 3)
		fail("a request is LOOP COUNT PARTS");
	for (i = 0; i < ARRAY_SIZE(loops); i++)
		if (!strcmp(loops[i].name, name))
			break;
	if (i == ARRAY_SIZE(loops))
		fail("no loop is called %s", name);
	result = loops[i].run(count, parts);
	printf("ok %lu %lu %lu\n", (unsigned long)result.done, (unsigned long)result.witness,
	       (unsigned long)result.ns);
}

int main(void)
{
	return serve_requests(serve);
}
