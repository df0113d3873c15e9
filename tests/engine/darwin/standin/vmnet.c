/* Stand-in for macOS: vmnet interfaces: start, read, write, event, stop: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define ALIVE 0x494e5445u
#define MOST_INTERFACES 32
#define DOCUMENTED_OCTETS (256 * 1024)

static struct interface *interfaces[MOST_INTERFACES];
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static bool enter(struct interface *interface) {
  bool room = false;
  pthread_mutex_lock(&table_lock);
  for (int i = 0; i < MOST_INTERFACES && !room; i++)
    if (!interfaces[i]) {
      interfaces[i] = interface;
      room = true;
    }
  pthread_mutex_unlock(&table_lock);
  return room;
}

static void leave(struct interface *interface) {
  pthread_mutex_lock(&table_lock);
  for (int i = 0; i < MOST_INTERFACES; i++)
    if (interfaces[i] == interface)
      interfaces[i] = NULL;
  pthread_mutex_unlock(&table_lock);
}

long standin_interfaces(void) {
  long count = 0;
  pthread_mutex_lock(&table_lock);
  for (int i = 0; i < MOST_INTERFACES; i++)
    count += interfaces[i] != NULL;
  pthread_mutex_unlock(&table_lock);
  return count;
}

struct interface *interface_check(struct interface *interface, const char *function) {
  bool known = false;
  pthread_mutex_lock(&table_lock);
  for (int i = 0; i < MOST_INTERFACES; i++)
    known = known || (interface && interfaces[i] == interface);
  pthread_mutex_unlock(&table_lock);
  if (!known || interface->magic != ALIVE)
    misuse("%s: %p is no living interface", function, (void *)interface);
  return interface;
}

/* A status that the test asked for: standin_set("vmnet_read", 1001) fails every call, until it is set to 0. */
status_t forced(const char *function) { return (status_t)setting(function); }

static void rest(void) {
  struct timespec wait = {0, 5000000};
  nanosleep(&wait, NULL);
}

static void dispose(struct interface *interface) {
  leave(interface);
  if (interface->held)
    subnet_free(interface->start, interface->mask);
  memory_close(interface);
  if (interface->wire >= 0)
    close(interface->wire);
  if (interface->network) {
    interface->network->users--;
    object_release(interface->network);
  }
  for (struct rule *rule = interface->rules, *next; rule; rule = next) {
    next = rule->next;
    free(rule);
  }
  close(interface->wake[0]);
  close(interface->wake[1]);
  pthread_mutex_destroy(&interface->lock);
  interface->magic = 0;
  free(interface);
}

struct starting {
  struct interface *interface;
  struct block *handler;
  status_t status;
  xpc_ref param;
};

static void started(void *any) {
  struct starting *starting = any;
  while (setting("silent_start"))
    rest();
  struct interface *interface = starting->interface;
  if (starting->status == VMNET_SUCCESS) {
    if (pthread_create(&interface->poller, NULL, wire_poller, interface))
      misuse("no thread for an interface");
    interface->state = 2;
  }
  void (*invoke)(struct block *, uint32_t, xpc_ref) =
      (void (*)(struct block *, uint32_t, xpc_ref))starting->handler->invoke;
  invoke(starting->handler, starting->status, starting->param);
  if (starting->param)
    xpc_release(starting->param);
  if (starting->status != VMNET_SUCCESS)
    dispose(interface);
  _Block_release(starting->handler);
  free(starting);
}

static struct interface *begin(uint32_t mode, struct network *network, xpc_ref desc, queue_ref queue, void *handler) {
  while (setting("hang_start"))
    rest();
  if (setting("null_start") || !queue || !handler || !desc)
    return NULL;
  object_check(queue, QUEUE, "vmnet_start_interface");
  struct interface *interface = calloc(1, sizeof *interface);
  interface->magic = ALIVE;
  interface->state = 1;
  interface->mode = mode;
  interface->mtu = 1500;
  interface->largest = 1514;
  interface->limit = MACOS >= 1500 ? 256 : 200;
  interface->octets = MACOS >= 1500 ? 256 * 65550 : DOCUMENTED_OCTETS;
  interface->wire = -1;
  pthread_mutex_init(&interface->lock, NULL);
  if (pipe(interface->wake))
    misuse("no pipe");
  struct starting *starting = calloc(1, sizeof *starting);
  *starting = (struct starting){interface, _Block_copy(handler), forced("vmnet_start_interface"), NULL};
  if (!enter(interface) && !starting->status)
    starting->status = VMNET_FAILURE;
  if (network) {
    object_retain(network);
    network->users++;
    interface->network = network;
    interface->start = network->subnet | 1;
    interface->mask = network->mask;
    interface->mtu = network->mtu;
    interface->largest = network->mtu + 14;
  }
  if (!starting->status)
    starting->status = network ? set_offloads(interface, desc) : set_up(interface, desc);
  if (starting->status == VMNET_SUCCESS && !wire_open(interface))
    starting->status = VMNET_FAILURE;
  if (starting->status == VMNET_SUCCESS)
    starting->param = parameters(interface, desc);
  count_up("starts", 1);
  queue_submit(queue, started, starting);
  return interface;
}

struct interface *vmnet_start_interface(xpc_ref desc, queue_ref queue, void *handler) {
  uint32_t mode = desc ? (uint32_t)xpc_dictionary_get_uint64(desc, vmnet_operation_mode_key) : 0;
  if (mode < HOST || mode > BRIDGED)
    return NULL;
  return begin(mode, NULL, desc, queue, handler);
}

#if MACOS >= 2600
struct interface *vmnet_interface_start_with_network(
    struct network *network, xpc_ref desc, queue_ref queue, void *handler) {
  object_check(network, NETWORK, "vmnet_interface_start_with_network");
  return begin(network->mode, network, desc, queue, handler);
}
#endif

/* Packets. */
static status_t usable(struct interface *interface, int *count, const char *function) {
  interface_check(interface, function);
  if (forced(function))
    return forced(function);
  if (interface->state == 1)
    return VMNET_SETUP_INCOMPLETE;
  if (interface->state == 3)
    return VMNET_INVALID_ACCESS;
  if (!count || *count < 1)
    return VMNET_INVALID_ARGUMENT;
  return (size_t)*count > interface->limit ? VMNET_TOO_MANY_PACKETS : VMNET_SUCCESS;
}

status_t vmnet_read(struct interface *interface, struct vmpktdesc *packets, int *count) {
  status_t status = usable(interface, count, "vmnet_read");
  if (status != VMNET_SUCCESS)
    return status;
  size_t need = interface->largest + (interface->vnet_header ? 12 : 0), room = 0;
  int fit = 0;
  for (; fit < *count && (room += need) <= interface->octets; fit++) {
    size_t length = 0;
    for (uint32_t j = 0; j < packets[fit].vm_pkt_iovcnt; j++)
      length += packets[fit].vm_pkt_iov[j].iov_len;
    if (packets[fit].vm_flags || packets[fit].vm_pkt_size < need || length < packets[fit].vm_pkt_size)
      return VMNET_INVALID_ARGUMENT;
  }
  *count = wire_read(interface, packets, fit);
  count_up("reads", 1);
  return VMNET_SUCCESS;
}

status_t vmnet_write(struct interface *interface, struct vmpktdesc *packets, int *count) {
  status_t status = usable(interface, count, "vmnet_write");
  if (status != VMNET_SUCCESS)
    return status;
  size_t most = interface->largest + (interface->vnet_header ? 12 : 0), total = 0;
  for (int i = 0; i < *count; i++) {
    if (packets[i].vm_pkt_iovcnt != 1 || packets[i].vm_flags || packets[i].vm_pkt_size < 14)
      return VMNET_INVALID_ARGUMENT;
    if (packets[i].vm_pkt_iov->iov_len != packets[i].vm_pkt_size)
      return VMNET_INVALID_ARGUMENT;
    if (packets[i].vm_pkt_size > most)
      return VMNET_PACKET_TOO_BIG;
    total += packets[i].vm_pkt_size;
  }
  if (total > interface->octets)
    return VMNET_TOO_MANY_PACKETS;
  if (setting("exhausted") > 0) {
    standin_set("exhausted", setting("exhausted") - 1);
    return VMNET_BUFFER_EXHAUSTED;
  }
  int sent = wire_write(interface, packets, *count);
  count_up("writes", 1);
  if (!sent)
    return VMNET_BUFFER_EXHAUSTED;
  *count = sent;
  return VMNET_SUCCESS;
}

/* Event and stop. */
status_t vmnet_interface_set_event_callback(struct interface *interface, uint32_t mask, queue_ref queue, void *block) {
  interface_check(interface, "vmnet_interface_set_event_callback");
  if (forced("vmnet_interface_set_event_callback"))
    return forced("vmnet_interface_set_event_callback");
  if (interface->state != 2)
    return interface->state == 1 ? VMNET_SETUP_INCOMPLETE : VMNET_INVALID_ACCESS;
  if (!queue != !block || (block && mask != 1))
    return VMNET_INVALID_ARGUMENT;
  if (queue)
    object_retain(object_check(queue, QUEUE, "vmnet_interface_set_event_callback"));
  block = _Block_copy(block);
  pthread_mutex_lock(&interface->lock);
  queue_ref old_queue = interface->event_queue;
  void *old_block = interface->event_block;
  interface->event_mask = mask;
  interface->event_queue = queue;
  interface->event_block = block;
  pthread_mutex_unlock(&interface->lock);
  _Block_release(old_block);
  if (old_queue)
    object_release(old_queue);
  count_up(block ? "armed" : "disarmed", 1);
  if (write(interface->wake[1], "", 1) != 1)
    misuse("a full pipe");
  return VMNET_SUCCESS;
}

struct stopping {
  struct interface *interface;
  struct block *handler;
};

void completion(struct block *block, status_t status) {
  ((void (*)(struct block *, uint32_t))block->invoke)(block, status);
}

static void *stop(void *any) {
  struct stopping *stopping = any;
  while (setting("silent_stop"))
    rest();
  pthread_join(stopping->interface->poller, NULL);
  if (stopping->interface->event_block)
    count_up("stopped_armed", 1);
  _Block_release(stopping->interface->event_block);
  if (stopping->interface->event_queue)
    object_release(stopping->interface->event_queue);
  dispose(stopping->interface);
  count_up("stops", 1);
  return NULL;
}

static void complete(void *any) {
  struct stopping *stopping = any;
  completion(stopping->handler, VMNET_SUCCESS);
  _Block_release(stopping->handler);
  free(stopping);
}

struct finish {
  struct stopping *stopping;
  queue_ref queue;
};

/* Not on the caller's queue: the event may be running there, and is waited for. */
static void *finish(void *any) {
  struct finish *todo = any;
  stop(todo->stopping);
  queue_submit(todo->queue, complete, todo->stopping);
  object_release(todo->queue);
  free(todo);
  return NULL;
}

status_t vmnet_stop_interface(struct interface *interface, queue_ref queue, void *handler) {
  interface_check(interface, "vmnet_stop_interface");
  while (setting("hang_stop"))
    rest();
  if (!queue || !handler)
    return VMNET_INVALID_ARGUMENT;
  if (forced("vmnet_stop_interface"))
    return forced("vmnet_stop_interface");
  int up = 2;
  if (!atomic_compare_exchange_strong(&interface->state, &up, 3))
    return up == 1 ? VMNET_SETUP_INCOMPLETE : VMNET_INVALID_ACCESS;
  if (write(interface->wake[1], "", 1) != 1)
    misuse("a full pipe");
  struct stopping *stopping = malloc(sizeof *stopping);
  *stopping = (struct stopping){interface, _Block_copy(handler)};
  struct finish *todo = malloc(sizeof *todo);
  object_retain(object_check(queue, QUEUE, "vmnet_stop_interface"));
  *todo = (struct finish){stopping, queue};
  pthread_t thread;
  if (pthread_create(&thread, NULL, finish, todo))
    misuse("no thread for a stop");
  pthread_detach(thread);
  return VMNET_SUCCESS;
}

xpc_ref vmnet_copy_shared_interface_list(void) {
  if (setting("no_interfaces"))
    return NULL;
  while (setting("hang_list"))
    rest();
  const char *names[] = {"en0", "en1"};
  xpc_ref list = xpc_array_create(NULL, 0);
  for (int i = 0; i < 2; i++) {
    xpc_ref name = xpc_string_create(names[i]);
    xpc_array_append_value(list, name);
    xpc_release(name);
  }
  return list;
}
