/* Stand-in for macOS, where reference-counted objects, settings and counters live: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALIVE 0x414c4956u
#define GONE 0x474f4e45u

static _Atomic long live[KINDS];
static const char *const names[KINDS] = {"", "queue", "semaphore", "xpc", "configuration", "network"};

void misuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("stand-in: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  abort();
}

void *object_new(size_t size, enum kind kind, void (*destroy)(struct object *)) {
  struct object *object = calloc(1, size);
  if (!object)
    misuse("no memory");
  object->magic = ALIVE;
  object->kind = kind;
  object->refs = 1;
  object->destroy = destroy;
  live[kind]++;
  return object;
}

void *object_check(const void *any, enum kind kind, const char *function) {
  const struct object *object = any;
  if (!object)
    misuse("%s: NULL is no %s", function, names[kind]);
  if (object->magic != ALIVE)
    misuse("%s: %p is no living object", function, any);
  if (object->kind != kind)
    misuse("%s: a %s is no %s", function, names[object->kind], names[kind]);
  return (void *)any;
}

void object_retain(void *any) {
  struct object *object = any;
  if (object->magic != ALIVE)
    misuse("retain: %p is no living object", any);
  if (object->refs > 0)
    object->refs++;
}

void object_release(void *any) {
  struct object *object = any;
  if (!object || object->magic != ALIVE)
    misuse("release: %p is no living object", any);
  if (object->refs < 0 || --object->refs > 0)
    return;
  object->magic = GONE;
  live[object->kind]--;
  object->destroy(object);
}

long standin_objects(int kind) { return live[kind]; }

/* Settings and counters: a small table each, under one lock. */
#define MOST 64
struct entry {
  char name[64];
  long value;
};
static struct entry settings[MOST], counters[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct entry *find(struct entry *table, const char *name, bool make) {
  for (int i = 0; i < MOST; i++) {
    if (!table[i].name[0]) {
      if (!make)
        return NULL;
      snprintf(table[i].name, sizeof table[i].name, "%s", name);
      return &table[i];
    }
    if (!strcmp(table[i].name, name))
      return &table[i];
  }
  misuse("more than %d names", MOST);
}

const char *setting_text(const char *name) {
  char variable[64] = "STANDIN_";
  size_t at = strlen(variable);
  for (; *name && at < sizeof variable - 1; name++)
    variable[at++] = (char)toupper((unsigned char)*name);
  return getenv(variable);
}

void standin_set(const char *name, long value) {
  pthread_mutex_lock(&lock);
  find(settings, name, true)->value = value;
  pthread_mutex_unlock(&lock);
}

long setting(const char *name) {
  pthread_mutex_lock(&lock);
  struct entry *entry = find(settings, name, false);
  long value = entry ? entry->value : 0;
  pthread_mutex_unlock(&lock);
  if (!entry) {
    const char *text = setting_text(name);
    if (text)
      value = strtol(text, NULL, 10);
  }
  return value;
}

void count_up(const char *name, long by) {
  pthread_mutex_lock(&lock);
  find(counters, name, true)->value += by;
  pthread_mutex_unlock(&lock);
}

long standin_count(const char *name) {
  pthread_mutex_lock(&lock);
  struct entry *entry = find(counters, name, false);
  long value = entry ? entry->value : 0;
  pthread_mutex_unlock(&lock);
  return value;
}
