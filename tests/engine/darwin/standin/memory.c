/* Stand-in for macOS: a wire that is two queues in memory, of any length, for tests that want no socket's limits.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct frame {
  struct frame *next;
  size_t size;
  char octets[];
};

struct way {
  struct frame *first, **last;
};

struct memory {
  pthread_mutex_t lock;
  struct way in, out;
};

/* The wire of the latest interface that got one, for standin_send and standin_receive. */
static struct interface *current;
static _Atomic bool wanted;

/* The next interface is joined to a wire in memory. */
void standin_memory(void) { wanted = true; }

static void put(struct way *way, const void *octets, size_t size) {
  struct frame *frame = malloc(sizeof *frame + size);
  if (!frame)
    misuse("no memory");
  frame->next = NULL;
  frame->size = size;
  memcpy(frame->octets, octets, size);
  *way->last = frame;
  way->last = &frame->next;
}

static struct frame *take(struct way *way) {
  struct frame *frame = way->first;
  if (frame && !(way->first = frame->next))
    way->last = &way->first;
  return frame;
}

bool memory_open(struct interface *interface) {
  if (!atomic_exchange(&wanted, false))
    return false;
  struct memory *memory = calloc(1, sizeof *memory);
  pthread_mutex_init(&memory->lock, NULL);
  memory->in.last = &memory->in.first;
  memory->out.last = &memory->out.first;
  interface->memory = memory;
  interface->wire = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  current = interface;
  return true;
}

void memory_close(struct interface *interface) {
  struct memory *memory = interface->memory;
  if (!memory)
    return;
  for (struct frame *frame; (frame = take(&memory->in)) || (frame = take(&memory->out));)
    free(frame);
  if (current == interface)
    current = NULL;
  pthread_mutex_destroy(&memory->lock);
  free(memory);
}

int memory_read(struct interface *interface, struct vmpktdesc *packets, int count) {
  struct memory *memory = interface->memory;
  int done = 0;
  pthread_mutex_lock(&memory->lock);
  for (struct frame *frame; done < count && (frame = take(&memory->in)); done++) {
    memcpy(packets[done].vm_pkt_iov->iov_base, frame->octets, frame->size);
    packets[done].vm_pkt_size = frame->size;
    free(frame);
  }
  uint64_t ignored;
  if (!memory->in.first && read(interface->wire, &ignored, sizeof ignored) < 0)
    ignored = 0;
  pthread_mutex_unlock(&memory->lock);
  return done;
}

int memory_write(struct interface *interface, struct vmpktdesc *packets, int count) {
  struct memory *memory = interface->memory;
  pthread_mutex_lock(&memory->lock);
  for (int i = 0; i < count; i++)
    put(&memory->out, packets[i].vm_pkt_iov->iov_base, packets[i].vm_pkt_size);
  pthread_mutex_unlock(&memory->lock);
  return count;
}

/* From the test to the interface; false when there is none. */
bool standin_send(const void *octets, size_t size) {
  struct interface *interface = current;
  if (!interface)
    return false;
  struct memory *memory = interface->memory;
  uint64_t one = 1;
  pthread_mutex_lock(&memory->lock);
  put(&memory->in, octets, size);
  bool fine = write(interface->wire, &one, sizeof one) == sizeof one;
  pthread_mutex_unlock(&memory->lock);
  return fine;
}

/* From the interface to the test: the frame's length, or 0 when none is there. */
size_t standin_receive(void *octets, size_t room) {
  struct interface *interface = current;
  if (!interface)
    return 0;
  struct memory *memory = interface->memory;
  pthread_mutex_lock(&memory->lock);
  struct frame *frame = take(&memory->out);
  pthread_mutex_unlock(&memory->lock);
  size_t size = frame ? frame->size : 0;
  if (size > room)
    misuse("standin_receive: a frame of %zu octets", size);
  if (frame)
    memcpy(octets, frame->octets, size);
  free(frame);
  return size;
}
