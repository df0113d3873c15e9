/* A stand-in for Apple's vmnet.framework and the parts of libSystem it needs, so that the macOS engine runs without a Mac.
 * SPDX-License-Identifier: Apache-2.0
 *
 * It keeps the documented layouts and rules: what the engine gets wrong fails here as it would there. Objects bear a
 * magic number, and one that is used after its release, or as what it is not, ends the process with a sentence.
 * MACOS is the version whose symbols are exported: 1015, 1100, 1200, 1500, 1504, 2600.
 */
#ifndef STANDIN_H
#define STANDIN_H

#define _GNU_SOURCE
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifndef MACOS
#define MACOS 2600
#endif

/* Objects: everything with a reference count. */
enum kind { QUEUE = 1, SEMAPHORE, XPC, CONFIGURATION, NETWORK, KINDS };

struct object {
  uint32_t magic, kind;
  _Atomic int refs; /* a negative count never changes: the object is for ever */
  void (*destroy)(struct object *);
};

void *object_new(size_t size, enum kind kind, void (*destroy)(struct object *));
void *object_check(const void *object, enum kind kind, const char *function);
void object_retain(void *object);
void object_release(void *object);
void misuse(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
long standin_objects(int kind);

/* Settings, by name, through standin_set or the environment (STANDIN_NAME). */
long setting(const char *name);
const char *setting_text(const char *name);
void standin_set(const char *name, long value);
void count_up(const char *name, long by);
long standin_count(const char *name);

/* Blocks. */
struct block_descriptor {
  unsigned long reserved, size;
};
struct block {
  void *isa;
  int flags, reserved;
  void (*invoke)(void);
  struct block_descriptor *descriptor;
};
extern void *_NSConcreteGlobalBlock[32], *_NSConcreteStackBlock[32], *_NSConcreteMallocBlock[32];
void *_Block_copy(const void *block);
void _Block_release(const void *block);

/* Dispatch. */
typedef struct queue *queue_ref;
queue_ref dispatch_queue_create(const char *label, void *attributes);
void queue_submit(queue_ref queue, void (*work)(void *), void *argument);
queue_ref dispatch_get_global_queue(long identifier, unsigned long flags);

/* XPC. */
typedef struct xpc *xpc_ref;
extern const char _xpc_type_dictionary[], _xpc_type_uint64[], _xpc_type_string[], _xpc_type_bool[], _xpc_type_uuid[];
xpc_ref xpc_dictionary_create(const char *const *keys, xpc_ref *values, size_t count);
void xpc_dictionary_set_uint64(xpc_ref dictionary, const char *key, uint64_t value);
void xpc_dictionary_set_bool(xpc_ref dictionary, const char *key, bool value);
void xpc_dictionary_set_string(xpc_ref dictionary, const char *key, const char *value);
void xpc_dictionary_set_uuid(xpc_ref dictionary, const char *key, const uint8_t *value);
uint64_t xpc_dictionary_get_uint64(xpc_ref dictionary, const char *key);
bool xpc_dictionary_get_bool(xpc_ref dictionary, const char *key);
const char *xpc_dictionary_get_string(xpc_ref dictionary, const char *key);
const uint8_t *xpc_dictionary_get_uuid(xpc_ref dictionary, const char *key);
xpc_ref xpc_dictionary_get_value(xpc_ref dictionary, const char *key);
xpc_ref xpc_array_create(xpc_ref *values, size_t count);
void xpc_array_append_value(xpc_ref array, xpc_ref value);
xpc_ref xpc_string_create(const char *text);
const void *xpc_get_type(xpc_ref object);
void xpc_release(xpc_ref object);
bool xpc_dictionary_apply_c(xpc_ref dictionary, bool (*each)(const char *key, xpc_ref value, void *), void *argument);

/* vmnet. */
typedef uint32_t status_t;
enum {
  VMNET_SUCCESS = 1000, VMNET_FAILURE, VMNET_MEM_FAILURE, VMNET_INVALID_ARGUMENT, VMNET_SETUP_INCOMPLETE,
  VMNET_INVALID_ACCESS, VMNET_PACKET_TOO_BIG, VMNET_BUFFER_EXHAUSTED, VMNET_TOO_MANY_PACKETS,
  VMNET_SHARING_SERVICE_BUSY, VMNET_NOT_AUTHORIZED
};
enum { HOST = 1000, SHARED, BRIDGED };

struct vmpktdesc {
  size_t vm_pkt_size;
  struct iovec *vm_pkt_iov;
  uint32_t vm_pkt_iovcnt, vm_flags;
};

struct rule {
  struct rule *next;
  uint8_t protocol, family;
  uint16_t external, internal;
  uint8_t address[16];
};

struct network {
  struct object object;
  uint32_t mode, mtu;
  uint32_t subnet, mask; /* host order; the gateway is subnet | 1 */
  uint8_t prefix[16], prefix_length;
  bool pinned, no_dhcp;
  int users;
  struct rule *rules;
};

struct interface {
  uint32_t magic;
  _Atomic int state; /* 1 being set up, 2 up, 3 stopped */
  uint32_t mode, mtu, start, mask;
  size_t largest, limit, octets;
  bool held; /* whether its subnet is in the table of taken ones */
  int wire, wake[2];
  bool tap, vnet_header;
  struct memory *memory;
  pthread_mutex_t lock;
  pthread_t poller;
  uint32_t event_mask;
  queue_ref event_queue;
  struct block *event_block;
  unsigned generation; /* of the armed event, so that a callback of an earlier one is not delivered */
  struct rule *rules;
  struct network *network;
};

struct interface *interface_check(struct interface *interface, const char *function);
status_t forced(const char *function);
status_t subnet_take(uint32_t mode, uint32_t start, uint32_t mask, bool exclusive);
void subnet_free(uint32_t start, uint32_t mask);
bool entitled(void);
status_t set_up(struct interface *interface, xpc_ref desc);
status_t set_offloads(struct interface *interface, xpc_ref desc);
xpc_ref parameters(struct interface *interface, xpc_ref desc);
extern const char *const vmnet_operation_mode_key, *const vmnet_estimated_packets_available_key;
void completion(struct block *block, status_t status);

/* The wire of an interface: a TAP, an end of a datagram socketpair, or queues in memory. */
bool wire_open(struct interface *interface);
int wire_read(struct interface *interface, struct vmpktdesc *packets, int count);
int wire_write(struct interface *interface, struct vmpktdesc *packets, int count);
void *wire_poller(void *interface);
bool memory_open(struct interface *interface);
void memory_close(struct interface *interface);
int memory_read(struct interface *interface, struct vmpktdesc *packets, int count);
int memory_write(struct interface *interface, struct vmpktdesc *packets, int count);

/* The batch calls on datagram sockets. */
struct msghdr_x {
  void *msg_name;
  uint32_t msg_namelen;
  struct iovec *msg_iov;
  int msg_iovlen;
  void *msg_control;
  uint32_t msg_controllen;
  int msg_flags;
  size_t msg_datalen;
};
ssize_t recvmsg_x(int fd, struct msghdr_x *messages, unsigned count, int flags);
ssize_t sendmsg_x(int fd, struct msghdr_x *messages, unsigned count, int flags);

status_t vmnet_read(struct interface *interface, struct vmpktdesc *packets, int *count);
status_t vmnet_write(struct interface *interface, struct vmpktdesc *packets, int *count);

#endif
