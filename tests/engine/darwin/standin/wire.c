/* Stand-in for macOS: what is at the other side of an interface, a Linux TAP or a datagram socket: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 256

static _Atomic int next_wire = -1;

/* The datagram socket that the next interface is joined to. */
void standin_wire(int fd) { next_wire = fd; }

/* STANDIN_BRIDGE: put the TAP into that bridge, and bring it up. */
static bool into_bridge(const char *tap, const char *bridge) {
  struct ifreq request = {0};
  int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  snprintf(request.ifr_name, IFNAMSIZ, "%s", bridge);
  request.ifr_ifindex = (int)if_nametoindex(tap);
  bool fine = !ioctl(control, SIOCBRADDIF, &request);
  memset(&request, 0, sizeof request);
  snprintf(request.ifr_name, IFNAMSIZ, "%s", tap);
  fine = fine && !ioctl(control, SIOCGIFFLAGS, &request);
  request.ifr_flags |= IFF_UP;
  fine = fine && !ioctl(control, SIOCSIFFLAGS, &request);
  close(control);
  return fine;
}

static bool open_tap(struct interface *interface, const char *name) {
  struct ifreq request = {0};
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  request.ifr_flags = IFF_TAP | IFF_NO_PI | (interface->vnet_header ? IFF_VNET_HDR : 0);
  snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
  if (fd < 0 || ioctl(fd, TUNSETIFF, &request)) {
    fprintf(stderr, "stand-in: TAP %s: %s\n", name, strerror(errno));
    return false;
  }
  int header = 12;
  if (interface->vnet_header)
    ioctl(fd, TUNSETVNETHDRSZ, &header);
  const char *bridge = setting_text("bridge");
  if (bridge && !into_bridge(request.ifr_name, bridge)) {
    fprintf(stderr, "stand-in: %s into bridge %s: %s\n", request.ifr_name, bridge, strerror(errno));
    return false;
  }
  interface->wire = fd;
  interface->tap = true;
  return true;
}

bool wire_open(struct interface *interface) {
  if (memory_open(interface))
    return true;
  const char *tap = setting_text("tap");
  int fd = atomic_exchange(&next_wire, -1);
  if (fd < 0 && tap)
    return open_tap(interface, tap);
  interface->wire = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
  return true;
}

static int tap_read(struct interface *interface, struct vmpktdesc *packets, int count) {
  int done = 0;
  for (; done < count; done++) {
    ssize_t got = readv(interface->wire, packets[done].vm_pkt_iov, (int)packets[done].vm_pkt_iovcnt);
    if (got <= 0)
      break;
    packets[done].vm_pkt_size = (size_t)got;
  }
  return done;
}

int wire_read(struct interface *interface, struct vmpktdesc *packets, int count) {
  if (interface->wire < 0)
    return 0;
  int done;
  if (interface->memory) {
    done = memory_read(interface, packets, count);
  } else if (interface->tap) {
    done = tap_read(interface, packets, count);
  } else {
    struct mmsghdr messages[MOST];
    for (int i = 0; i < count; i++)
      messages[i].msg_hdr = (struct msghdr){.msg_iov = packets[i].vm_pkt_iov, .msg_iovlen = packets[i].vm_pkt_iovcnt};
    done = recvmmsg(interface->wire, messages, (unsigned)count, MSG_DONTWAIT, NULL);
    for (int i = 0; i < done; i++)
      packets[i].vm_pkt_size = messages[i].msg_len;
  }
  if (!setting("iov_len_kept"))
    for (int i = 0; i < done; i++)
      if (packets[i].vm_pkt_iovcnt == 1)
        packets[i].vm_pkt_iov->iov_len = packets[i].vm_pkt_size;
  return done < 0 ? 0 : done;
}

/* How many went out: fewer than `count` when the wire is full. */
int wire_write(struct interface *interface, struct vmpktdesc *packets, int count) {
  if (interface->wire < 0)
    return count;
  if (interface->memory)
    return memory_write(interface, packets, count);
  int done = 0;
  if (interface->tap) {
    while (done < count && (writev(interface->wire, packets[done].vm_pkt_iov, 1) >= 0 || errno == EIO))
      done++; /* EIO: the link is down, and drops */
    return done;
  }
  struct mmsghdr messages[MOST];
  for (int i = 0; i < count; i++)
    messages[i].msg_hdr = (struct msghdr){.msg_iov = packets[i].vm_pkt_iov, .msg_iovlen = 1};
  while (done < count) {
    int sent = sendmmsg(interface->wire, messages + done, (unsigned)(count - done), MSG_DONTWAIT);
    if (sent <= 0) {
      if (errno != EAGAIN)
        return count; /* nobody is there: dropped */
      struct pollfd room = {interface->wire, POLLOUT, 0};
      if (done == 0 || poll(&room, 1, 1000) <= 0)
        return done;
      continue;
    }
    done += sent;
  }
  return done;
}

/* The event: level-triggered, on the queue's thread, and again as long as a packet waits and the callback is set. */
struct delivery {
  struct interface *interface;
  struct block *block;
  uint32_t mask;
  pthread_mutex_t lock;
  pthread_cond_t news;
  bool over;
};

static void deliver(void *any) {
  struct delivery *delivery = any;
  xpc_ref event = xpc_dictionary_create(NULL, NULL, 0);
  xpc_dictionary_set_uint64(event, vmnet_estimated_packets_available_key, 1);
  void (*invoke)(struct block *, uint32_t, xpc_ref) = (void (*)(struct block *, uint32_t, xpc_ref))delivery->block->invoke;
  invoke(delivery->block, delivery->mask, event);
  xpc_release(event);
  count_up("events", 1);
  pthread_mutex_lock(&delivery->lock);
  delivery->over = true;
  pthread_cond_signal(&delivery->news);
  pthread_mutex_unlock(&delivery->lock);
}

static void fire(struct interface *interface) {
  struct delivery delivery = {.interface = interface};
  pthread_mutex_lock(&interface->lock);
  queue_ref queue = interface->event_queue;
  if (queue && interface->event_block) {
    object_retain(queue);
    delivery.block = _Block_copy(interface->event_block);
    delivery.mask = interface->event_mask;
  }
  pthread_mutex_unlock(&interface->lock);
  if (!delivery.block)
    return;
  pthread_mutex_init(&delivery.lock, NULL);
  pthread_cond_init(&delivery.news, NULL);
  queue_submit(queue, deliver, &delivery);
  pthread_mutex_lock(&delivery.lock);
  while (!delivery.over)
    pthread_cond_wait(&delivery.news, &delivery.lock);
  pthread_mutex_unlock(&delivery.lock);
  pthread_cond_destroy(&delivery.news);
  pthread_mutex_destroy(&delivery.lock);
  _Block_release(delivery.block);
  object_release(queue);
}

void *wire_poller(void *any) {
  struct interface *interface = any;
  for (;;) {
    pthread_mutex_lock(&interface->lock);
    bool armed = interface->event_block && interface->wire >= 0;
    pthread_mutex_unlock(&interface->lock);
    struct pollfd fds[2] = {{interface->wake[0], POLLIN, 0}, {armed ? interface->wire : -1, POLLIN, 0}};
    poll(fds, 2, -1);
    if (fds[0].revents) {
      char octets[64];
      if (read(interface->wake[0], octets, sizeof octets) <= 0)
        return NULL;
      if (interface->state == 3)
        return NULL;
      continue;
    }
    if (fds[1].revents & POLLIN)
      fire(interface);
  }
}
