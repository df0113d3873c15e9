/* Stand-in for macOS: blocks and libdispatch, as far as the engine uses them: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Blocks. */
enum { NEEDS_FREE = 1 << 24, HAS_COPY_DISPOSE = 1 << 25, IS_GLOBAL = 1 << 28, HAS_SIGNATURE = 1 << 30 };

void *_NSConcreteGlobalBlock[32], *_NSConcreteStackBlock[32], *_NSConcreteMallocBlock[32];

struct heap_block {
  _Atomic int refs;
  struct block block;
};

static const struct block *block_check(const void *any, const char *function) {
  const struct block *block = any;
  bool global = block->isa == _NSConcreteGlobalBlock;
  if (!global && block->isa != _NSConcreteStackBlock && block->isa != _NSConcreteMallocBlock)
    misuse("%s: %p has no block's isa", function, any);
  if (global != !!(block->flags & IS_GLOBAL))
    misuse("%s: isa and flags %#x disagree on whether the block is global", function, block->flags);
  if (!block->invoke || !block->descriptor)
    misuse("%s: a block without invoke function or descriptor", function);
  if (block->descriptor->reserved || block->descriptor->size < sizeof(struct block))
    misuse("%s: a block's descriptor with size %lu", function, block->descriptor->size);
  if (block->flags & HAS_SIGNATURE) {
    const char *const *more = (const char *const *)(block->descriptor + 1);
    const char *signature = block->flags & HAS_COPY_DISPOSE ? more[2] : more[0];
    if (!signature || !strstr(signature, "@?"))
      misuse("%s: a block's signature without the block itself", function);
  }
  return block;
}

void *_Block_copy(const void *any) {
  if (!any)
    return NULL;
  const struct block *block = block_check(any, "_Block_copy");
  if (block->flags & IS_GLOBAL)
    return (void *)block;
  if (block->flags & NEEDS_FREE) {
    struct heap_block *heap = (struct heap_block *)((char *)block - offsetof(struct heap_block, block));
    heap->refs++;
    return (void *)block;
  }
  struct heap_block *heap = malloc(offsetof(struct heap_block, block) + block->descriptor->size);
  if (!heap)
    misuse("no memory");
  heap->refs = 1;
  memcpy(&heap->block, block, block->descriptor->size);
  heap->block.isa = _NSConcreteMallocBlock;
  heap->block.flags |= NEEDS_FREE;
  if (block->flags & HAS_COPY_DISPOSE) {
    void (*copy)(void *, const void *) = ((void (**)(void *, const void *))(block->descriptor + 1))[0];
    copy(&heap->block, block);
  }
  return &heap->block;
}

void _Block_release(const void *any) {
  if (!any)
    return;
  const struct block *block = block_check(any, "_Block_release");
  if (!(block->flags & NEEDS_FREE))
    return;
  struct heap_block *heap = (struct heap_block *)((char *)block - offsetof(struct heap_block, block));
  if (--heap->refs)
    return;
  if (block->flags & HAS_COPY_DISPOSE) {
    void (*dispose)(const void *) = ((void (**)(const void *))(block->descriptor + 1))[1];
    dispose(block);
  }
  free(heap);
}

/* Queues: one worker thread each; the concurrent ones too, which is one of the orders they allow. */
struct work {
  struct work *next;
  void (*run)(void *);
  void *argument;
};

struct queue {
  struct object object;
  pthread_mutex_t lock;
  pthread_cond_t news;
  struct work *first, **last;
  bool over;
};

const char _dispatch_queue_attr_concurrent[64];

static void *worker(void *any) {
  struct queue *queue = any;
  pthread_mutex_lock(&queue->lock);
  for (;;) {
    while (!queue->first && !queue->over)
      pthread_cond_wait(&queue->news, &queue->lock);
    struct work *work = queue->first;
    if (!work)
      break;
    if (!(queue->first = work->next))
      queue->last = &queue->first;
    pthread_mutex_unlock(&queue->lock);
    work->run(work->argument);
    free(work);
    object_release(queue); /* what queue_submit retained */
    pthread_mutex_lock(&queue->lock);
  }
  pthread_mutex_unlock(&queue->lock);
  pthread_cond_destroy(&queue->news);
  pthread_mutex_destroy(&queue->lock);
  free(queue);
  return NULL;
}

/* The last reference may go on the worker's own thread, so that it is the worker who frees. */
static void queue_end(struct object *object) {
  struct queue *queue = (struct queue *)object;
  pthread_mutex_lock(&queue->lock);
  queue->over = true;
  pthread_cond_signal(&queue->news);
  pthread_mutex_unlock(&queue->lock);
}

queue_ref dispatch_queue_create(const char *label, void *attributes) {
  (void)label;
  if (attributes && attributes != _dispatch_queue_attr_concurrent)
    misuse("dispatch_queue_create: attributes that are none");
  struct queue *queue = object_new(sizeof *queue, QUEUE, queue_end);
  pthread_mutex_init(&queue->lock, NULL);
  pthread_cond_init(&queue->news, NULL);
  queue->last = &queue->first;
  pthread_t thread;
  pthread_attr_t detached;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  if (pthread_create(&thread, &detached, worker, queue))
    misuse("no thread for a queue");
  pthread_attr_destroy(&detached);
  return queue;
}

queue_ref dispatch_get_global_queue(long identifier, unsigned long flags) {
  static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
  static queue_ref global;
  if (flags || (identifier != 0x21 && identifier != 0x19 && identifier != 0x15 && identifier != 0))
    return NULL;
  pthread_mutex_lock(&once);
  if (!global) {
    global = dispatch_queue_create("global", NULL);
    global->object.refs = -1;
  }
  pthread_mutex_unlock(&once);
  return global;
}

void queue_submit(queue_ref queue, void (*run)(void *), void *argument) {
  object_check(queue, QUEUE, "dispatch_async");
  struct work *work = malloc(sizeof *work);
  if (!work)
    misuse("no memory");
  *work = (struct work){NULL, run, argument};
  object_retain(queue);
  pthread_mutex_lock(&queue->lock);
  *queue->last = work;
  queue->last = &work->next;
  pthread_cond_signal(&queue->news);
  pthread_mutex_unlock(&queue->lock);
}

static void run_block(void *any) {
  struct block *block = any;
  ((void (*)(struct block *))block->invoke)(block);
  _Block_release(block);
}

void dispatch_async(queue_ref queue, const void *block) { queue_submit(queue, run_block, _Block_copy(block)); }

void dispatch_retain(void *object) { object_retain(object); }
void dispatch_release(void *object) { object_release(object); }

/* Time and semaphores. */
uint64_t dispatch_time(uint64_t when, int64_t nanoseconds) {
  if (when == UINT64_MAX)
    return when;
  if (!when) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    when = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
  }
  return when + (uint64_t)nanoseconds;
}

struct semaphore {
  struct object object;
  pthread_mutex_t lock;
  pthread_cond_t news;
  long value;
};

static void semaphore_end(struct object *object) {
  struct semaphore *semaphore = (struct semaphore *)object;
  pthread_cond_destroy(&semaphore->news);
  pthread_mutex_destroy(&semaphore->lock);
  free(semaphore);
}

struct semaphore *dispatch_semaphore_create(long value) {
  struct semaphore *semaphore = object_new(sizeof *semaphore, SEMAPHORE, semaphore_end);
  pthread_mutex_init(&semaphore->lock, NULL);
  pthread_cond_init(&semaphore->news, NULL);
  semaphore->value = value;
  return semaphore;
}

long dispatch_semaphore_wait(struct semaphore *semaphore, uint64_t until) {
  object_check(semaphore, SEMAPHORE, "dispatch_semaphore_wait");
  struct timespec deadline = {(time_t)(until / 1000000000u), (long)(until % 1000000000u)};
  int error = 0;
  pthread_mutex_lock(&semaphore->lock);
  while (semaphore->value <= 0 && error != ETIMEDOUT)
    error = until == UINT64_MAX ? pthread_cond_wait(&semaphore->news, &semaphore->lock)
                                : pthread_cond_timedwait(&semaphore->news, &semaphore->lock, &deadline);
  bool got = semaphore->value > 0;
  if (got)
    semaphore->value--;
  pthread_mutex_unlock(&semaphore->lock);
  return got ? 0 : 49;
}

long dispatch_semaphore_signal(struct semaphore *semaphore) {
  object_check(semaphore, SEMAPHORE, "dispatch_semaphore_signal");
  pthread_mutex_lock(&semaphore->lock);
  semaphore->value++;
  pthread_cond_signal(&semaphore->news);
  pthread_mutex_unlock(&semaphore->lock);
  return 0;
}
