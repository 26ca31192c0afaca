// SPDX-License-Identifier: GPL-2.0-only
/*
 * Starts an emulated host without the harness, and says how long it took to answer.
 *
 *	bare_start cold|warm TIMEOUT_S CHANNEL_FD MONITOR_FD COMMAND...
 *
 * The command is the harness's own, which names the two descriptors. A cold machine first says
 * "ready" on its channel; then either kind is asked for its hello. Prints the nanoseconds from fork
 * to hello, and ends the machine.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HIGH_FD		100	/* where our descriptors are out of the way */

static const char hello_command[] = "{\"op\": \"hello\"}\n";

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* A connected pair: ours closes at exec, theirs is found as `number` after it. */
static int socket_for(int number, int *theirs)
{
	int pair[2], ours;

	if (number >= HIGH_FD) {
		errno = EBADF;
		die("descriptor number");
	}
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		die("socketpair");
	ours = fcntl(pair[0], F_DUPFD_CLOEXEC, HIGH_FD);
	*theirs = fcntl(pair[1], F_DUPFD_CLOEXEC, HIGH_FD);
	if (ours < 0 || *theirs < 0)
		die("fcntl");
	close(pair[0]);
	close(pair[1]);
	return ours;
}

enum answer { ANSWERED, TOO_LATE, ENDED };

static const char *const complaints[] = {
	[TOO_LATE] = "the machine did not answer in time",
	[ENDED] = "the machine ended",
};

/* Reads whole lines until one has `mark` in it. */
static enum answer wait_for(int fd, const char *mark, uint64_t deadline_ns)
{
	static char text[1 << 16];
	static size_t used;
	struct pollfd readable = { .fd = fd, .events = POLLIN };
	char *end;
	ssize_t got;

	for (;;) {
		while ((end = memchr(text, '\n', used))) {
			int found;

			*end = '\0';
			found = strstr(text, mark) != NULL;
			used -= end + 1 - text;
			memmove(text, end + 1, used);
			if (found)
				return ANSWERED;
		}
		if (now_ns() >= deadline_ns || used == sizeof(text))
			return TOO_LATE;
		if (poll(&readable, 1, 100) <= 0)
			continue;
		got = read(fd, text + used, sizeof(text) - used);
		if (got <= 0)
			return ENDED;
		used += got;
	}
}

static enum answer converse(int channel, int cold, uint64_t deadline_ns)
{
	enum answer answer = ANSWERED;

	if (cold)
		answer = wait_for(channel, "\"event\":\"ready\"", deadline_ns);
	if (answer != ANSWERED)
		return answer;
	if (write(channel, hello_command, strlen(hello_command)) < 0)
		return ENDED;
	return wait_for(channel, "\"event\":\"hello\"", deadline_ns);
}

static pid_t start_machine(char **command, int channel, int channel_fd, int monitor, int monitor_fd)
{
	pid_t machine = fork();

	if (machine < 0)
		die("fork");
	if (machine > 0)
		return machine;
	signal(SIGPIPE, SIG_DFL);
	dup2(channel, channel_fd);
	dup2(monitor, monitor_fd);
	execvp(command[0], command);
	die(command[0]);
	return -1;
}

int main(int argc, char **argv)
{
	int channel, their_channel, their_monitor;
	uint64_t start, deadline;
	enum answer answer;
	pid_t machine;

	if (argc < 6) {
		fprintf(stderr, "usage: bare_start cold|warm S CHANNEL_FD MONITOR_FD COMMAND...\n");
		return 1;
	}
	signal(SIGPIPE, SIG_IGN);
	start = now_ns();
	deadline = start + strtoull(argv[2], NULL, 10) * 1000000000ULL;
	channel = socket_for(atoi(argv[3]), &their_channel);
	socket_for(atoi(argv[4]), &their_monitor);
	machine = start_machine(argv + 5, their_channel, atoi(argv[3]), their_monitor,
				atoi(argv[4]));
	close(their_channel);
	close(their_monitor);
	answer = converse(channel, !strcmp(argv[1], "cold"), deadline);
	if (answer == ANSWERED)
		printf("%llu\n", (unsigned long long)(now_ns() - start));
	kill(machine, SIGKILL);
	waitpid(machine, NULL, 0);
	if (answer == ANSWERED)
		return 0;
	fprintf(stderr, "%s\n", complaints[answer]);
	return 1;
}
