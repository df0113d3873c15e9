/* Stand-in for macOS: recvmsg_x and sendmsg_x over recvmmsg and sendmmsg, and the relay's loop in C: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 256 /* kern.ipc.somaxrecvmsgx, somaxsendmsgx */

/* What XNU demands of a header; what it ignores is not checked. */
static bool proper(const struct msghdr_x *message) {
  return !message->msg_name && !message->msg_namelen && !message->msg_control && !message->msg_controllen &&
         !message->msg_flags && !message->msg_datalen && message->msg_iovlen > 0;
}

static int prepare(struct msghdr_x *messages, unsigned count, int flags, struct mmsghdr *prepared) {
  if (!count || (flags & ~MSG_DONTWAIT))
    return errno = EINVAL, -1;
  for (unsigned i = 0; i < count; i++) {
    if (!proper(&messages[i]))
      return errno = EINVAL, -1;
    prepared[i].msg_hdr = (struct msghdr){.msg_iov = messages[i].msg_iov, .msg_iovlen = (size_t)messages[i].msg_iovlen};
  }
  return 0;
}

ssize_t recvmsg_x(int fd, struct msghdr_x *messages, unsigned count, int flags) {
  struct mmsghdr prepared[MOST];
  if (count > MOST)
    count = MOST;
  if (prepare(messages, count, flags, prepared))
    return -1;
  int got = recvmmsg(fd, prepared, count, flags | MSG_WAITFORONE, NULL);
  for (int i = 0; i < got; i++) {
    messages[i].msg_datalen = prepared[i].msg_len;
    messages[i].msg_flags = prepared[i].msg_hdr.msg_flags & MSG_TRUNC;
  }
  return got;
}

ssize_t sendmsg_x(int fd, struct msghdr_x *messages, unsigned count, int flags) {
  struct mmsghdr prepared[MOST];
  if (count > MOST)
    count = MOST;
  if (prepare(messages, count, flags, prepared))
    return -1;
  if (setting("enobufs") > 0) {
    standin_set("enobufs", setting("enobufs") - 1);
    return errno = ENOBUFS, -1;
  }
  if (setting("sendmsg_most") > 0 && count > setting("sendmsg_most"))
    count = (unsigned)setting("sendmsg_most");
  int sent = sendmmsg(fd, prepared, count, flags);
  /* macOS has no event for room in a peer's buffer, and another name for its lack. */
  if (sent < 0 && errno == EAGAIN && setting("full_is_enobufs"))
    errno = ENOBUFS;
  return sent;
}

/* The same loop as the engine's, in C: what the wire holds goes to the VM, until `until` (s of CLOCK_MONOTONIC). */
static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

struct batch {
  struct vmpktdesc packets[MOST];
  struct iovec vectors[MOST];
  struct msghdr_x messages[MOST];
  size_t size;
  char *octets;
};

static struct batch *batch_new(int count, size_t size) {
  struct batch *batch = calloc(1, sizeof *batch);
  batch->size = size;
  batch->octets = calloc((size_t)count, size);
  for (int i = 0; i < count; i++) {
    batch->vectors[i] = (struct iovec){batch->octets + (size_t)i * size, size};
    batch->packets[i] = (struct vmpktdesc){size, &batch->vectors[i], 1, 0};
    batch->messages[i].msg_iov = &batch->vectors[i];
    batch->messages[i].msg_iovlen = 1;
  }
  return batch;
}

static void batch_reset(struct batch *batch, int count) {
  for (int i = 0; i < count; i++) {
    batch->vectors[i].iov_len = batch->packets[i].vm_pkt_size = batch->size;
    batch->packets[i].vm_flags = 0;
    batch->messages[i].msg_datalen = 0;
    batch->messages[i].msg_flags = 0;
  }
}

/* From the wire to the VM's socket `fd`; the number of batches. Waits for the wire by poll, as the event would. */
long standin_relay_down(struct interface *interface, int fd, int count, size_t size, double seconds) {
  struct batch *batch = batch_new(count, size);
  double until = now() + seconds;
  long batches = 0;
  for (int got; now() < until; batches += got > 0) {
    got = count;
    if (vmnet_read(interface, batch->packets, &got) != VMNET_SUCCESS)
      break;
    if (!got) {
      struct pollfd wire = {interface->wire, POLLIN, 0};
      poll(&wire, 1, 10);
      continue;
    }
    for (int i = 0; i < got; i++)
      batch->vectors[i].iov_len = batch->packets[i].vm_pkt_size;
    for (int sent = 0; sent < got && now() < until;) {
      ssize_t more = sendmsg_x(fd, batch->messages + sent, (unsigned)(got - sent), MSG_DONTWAIT);
      if (more > 0) {
        sent += (int)more;
        continue;
      }
      struct pollfd room = {fd, POLLOUT, 0};
      poll(&room, 1, 10);
    }
    batch_reset(batch, got);
  }
  free(batch->octets);
  free(batch);
  return batches;
}

/* From the VM's socket to the wire; the number of batches. */
long standin_relay_up(struct interface *interface, int fd, int count, size_t size, double seconds) {
  struct batch *batch = batch_new(count, size);
  double until = now() + seconds;
  long batches = 0;
  while (now() < until) {
    ssize_t got = recvmsg_x(fd, batch->messages, (unsigned)count, MSG_DONTWAIT);
    if (got <= 0) {
      struct pollfd wire = {fd, POLLIN, 0};
      poll(&wire, 1, 10);
      continue;
    }
    for (int i = 0; i < got; i++)
      batch->packets[i].vm_pkt_size = batch->vectors[i].iov_len = batch->messages[i].msg_datalen;
    int written = (int)got;
    while (vmnet_write(interface, batch->packets, &written) == VMNET_BUFFER_EXHAUSTED && now() < until) {
      struct pollfd room = {interface->wire, POLLOUT, 0};
      poll(&room, 1, 10);
    }
    batch_reset(batch, (int)got);
    batches++;
  }
  free(batch->octets);
  free(batch);
  return batches;
}

/* A source and a sink for benchmarks: frames of `size` octets into `fd`, and their count out of it. */
long standin_blast(int fd, size_t size, int count, double seconds) {
  struct mmsghdr messages[MOST] = {0};
  char *octets = calloc(1, size);
  struct iovec vector = {octets, size};
  octets[0] = 0x52;
  for (int i = 0; i < count; i++)
    messages[i].msg_hdr = (struct msghdr){.msg_iov = &vector, .msg_iovlen = 1};
  double until = now() + seconds;
  long sent = 0;
  while (now() < until) {
    int more = sendmmsg(fd, messages, (unsigned)count, MSG_DONTWAIT);
    if (more > 0) {
      sent += more;
      continue;
    }
    struct pollfd room = {fd, POLLOUT, 0};
    poll(&room, 1, 10);
  }
  free(octets);
  return sent;
}

long standin_sink(int fd, size_t size, int count, double seconds) {
  struct batch *batch = batch_new(count, size);
  double until = now() + seconds;
  long received = 0;
  while (now() < until) {
    ssize_t got = recvmsg_x(fd, batch->messages, (unsigned)count, MSG_DONTWAIT);
    if (got > 0) {
      received += got;
      batch_reset(batch, (int)got);
      continue;
    }
    struct pollfd wire = {fd, POLLIN, 0};
    poll(&wire, 1, 10);
  }
  free(batch->octets);
  free(batch);
  return received;
}
