/* Stand-in for macOS: XPC dictionaries, arrays and values, as far as the engine uses them: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char _xpc_type_dictionary[32], _xpc_type_array[32], _xpc_type_uint64[32], _xpc_type_int64[32],
    _xpc_type_string[32], _xpc_type_bool[32], _xpc_type_uuid[32];

struct pair {
  char *key;
  struct xpc *value;
};

struct xpc {
  struct object object;
  const char *type;
  union {
    uint64_t number;
    bool truth;
    char *text;
    uint8_t uuid[16];
    struct {
      struct pair *pairs; /* a dictionary's; an array's have no key */
      size_t count;
    };
  };
};

static void destroy(struct object *object) {
  struct xpc *xpc = (struct xpc *)object;
  if (xpc->type == _xpc_type_string)
    free(xpc->text);
  if (xpc->type == _xpc_type_dictionary || xpc->type == _xpc_type_array) {
    for (size_t i = 0; i < xpc->count; i++) {
      free(xpc->pairs[i].key);
      object_release(xpc->pairs[i].value);
    }
    free(xpc->pairs);
  }
  free(xpc);
}

static xpc_ref create(const char *type) {
  xpc_ref xpc = object_new(sizeof *xpc, XPC, destroy);
  xpc->type = type;
  return xpc;
}

static xpc_ref typed(xpc_ref xpc, const char *type, const char *function) {
  object_check(xpc, XPC, function);
  return xpc->type == type ? xpc : NULL;
}

static xpc_ref container(xpc_ref xpc, const char *type, const char *function) {
  if (!typed(xpc, type, function))
    misuse("%s: the object has another type", function);
  return xpc;
}

xpc_ref xpc_uint64_create(uint64_t value) {
  xpc_ref xpc = create(_xpc_type_uint64);
  xpc->number = value;
  return xpc;
}

xpc_ref xpc_int64_create(int64_t value) {
  xpc_ref xpc = create(_xpc_type_int64);
  xpc->number = (uint64_t)value;
  return xpc;
}

xpc_ref xpc_bool_create(bool value) {
  xpc_ref xpc = create(_xpc_type_bool);
  xpc->truth = value;
  return xpc;
}

xpc_ref xpc_string_create(const char *text) {
  xpc_ref xpc = create(_xpc_type_string);
  xpc->text = strdup(text);
  return xpc;
}

xpc_ref xpc_uuid_create(const uint8_t *value) {
  xpc_ref xpc = create(_xpc_type_uuid);
  memcpy(xpc->uuid, value, 16);
  return xpc;
}

xpc_ref xpc_retain(xpc_ref xpc) {
  object_retain(object_check(xpc, XPC, "xpc_retain"));
  return xpc;
}

void xpc_release(xpc_ref xpc) { object_release(object_check(xpc, XPC, "xpc_release")); }

const void *xpc_get_type(xpc_ref xpc) { return ((xpc_ref)object_check(xpc, XPC, "xpc_get_type"))->type; }

uint64_t xpc_uint64_get_value(xpc_ref xpc) {
  return typed(xpc, _xpc_type_uint64, "xpc_uint64_get_value") ? xpc->number : 0;
}
int64_t xpc_int64_get_value(xpc_ref xpc) {
  return typed(xpc, _xpc_type_int64, "xpc_int64_get_value") ? (int64_t)xpc->number : 0;
}
bool xpc_bool_get_value(xpc_ref xpc) { return typed(xpc, _xpc_type_bool, "xpc_bool_get_value") && xpc->truth; }
const char *xpc_string_get_string_ptr(xpc_ref xpc) {
  return typed(xpc, _xpc_type_string, "xpc_string_get_string_ptr") ? xpc->text : NULL;
}
const uint8_t *xpc_uuid_get_bytes(xpc_ref xpc) {
  return typed(xpc, _xpc_type_uuid, "xpc_uuid_get_bytes") ? xpc->uuid : NULL;
}

/* Containers. */
static void append(xpc_ref xpc, const char *key, xpc_ref value) {
  xpc->pairs = realloc(xpc->pairs, (xpc->count + 1) * sizeof *xpc->pairs);
  if (!xpc->pairs)
    misuse("no memory");
  xpc->pairs[xpc->count++] = (struct pair){key ? strdup(key) : NULL, value};
}

static struct pair *find(xpc_ref dictionary, const char *key) {
  for (size_t i = 0; i < dictionary->count; i++)
    if (!strcmp(dictionary->pairs[i].key, key))
      return &dictionary->pairs[i];
  return NULL;
}

/* Takes over the reference to `value`. */
static void put(xpc_ref dictionary, const char *key, xpc_ref value) {
  container(dictionary, _xpc_type_dictionary, "xpc_dictionary_set");
  struct pair *pair = find(dictionary, key);
  if (!pair) {
    append(dictionary, key, value);
    return;
  }
  object_release(pair->value);
  pair->value = value;
}

xpc_ref xpc_dictionary_create(const char *const *keys, xpc_ref *values, size_t count) {
  xpc_ref xpc = create(_xpc_type_dictionary);
  for (size_t i = 0; i < count; i++)
    put(xpc, keys[i], xpc_retain(values[i]));
  return xpc;
}

#if MACOS >= 1100
xpc_ref xpc_dictionary_create_empty(void) { return create(_xpc_type_dictionary); }
#endif

void xpc_dictionary_set_value(xpc_ref x, const char *key, xpc_ref value) { put(x, key, xpc_retain(value)); }
void xpc_dictionary_set_uint64(xpc_ref x, const char *key, uint64_t value) { put(x, key, xpc_uint64_create(value)); }
void xpc_dictionary_set_bool(xpc_ref x, const char *key, bool value) { put(x, key, xpc_bool_create(value)); }
void xpc_dictionary_set_string(xpc_ref x, const char *key, const char *text) { put(x, key, xpc_string_create(text)); }
void xpc_dictionary_set_uuid(xpc_ref x, const char *key, const uint8_t *uuid) { put(x, key, xpc_uuid_create(uuid)); }

xpc_ref xpc_dictionary_get_value(xpc_ref x, const char *key) {
  struct pair *pair = find(container(x, _xpc_type_dictionary, "xpc_dictionary_get"), key);
  return pair ? pair->value : NULL;
}
uint64_t xpc_dictionary_get_uint64(xpc_ref x, const char *key) {
  xpc_ref value = xpc_dictionary_get_value(x, key);
  return value ? xpc_uint64_get_value(value) : 0;
}
bool xpc_dictionary_get_bool(xpc_ref x, const char *key) {
  xpc_ref value = xpc_dictionary_get_value(x, key);
  return value && xpc_bool_get_value(value);
}
const char *xpc_dictionary_get_string(xpc_ref x, const char *key) {
  xpc_ref value = xpc_dictionary_get_value(x, key);
  return value ? xpc_string_get_string_ptr(value) : NULL;
}
const uint8_t *xpc_dictionary_get_uuid(xpc_ref x, const char *key) {
  xpc_ref value = xpc_dictionary_get_value(x, key);
  return value ? xpc_uuid_get_bytes(value) : NULL;
}

bool xpc_dictionary_apply_c(xpc_ref x, bool (*each)(const char *, xpc_ref, void *), void *argument) {
  container(x, _xpc_type_dictionary, "xpc_dictionary_apply");
  for (size_t i = 0; i < x->count; i++)
    if (!each(x->pairs[i].key, x->pairs[i].value, argument))
      return false;
  return true;
}

static bool call(const char *key, xpc_ref value, void *any) {
  struct block *block = any;
  return ((bool (*)(struct block *, const char *, xpc_ref))block->invoke)(block, key, value);
}

bool xpc_dictionary_apply(xpc_ref x, const void *block) { return xpc_dictionary_apply_c(x, call, (void *)block); }

xpc_ref xpc_array_create(xpc_ref *values, size_t count) {
  xpc_ref xpc = create(_xpc_type_array);
  for (size_t i = 0; i < count; i++)
    append(xpc, NULL, xpc_retain(values[i]));
  return xpc;
}

void xpc_array_append_value(xpc_ref x, xpc_ref value) {
  append(container(x, _xpc_type_array, "xpc_array_append_value"), NULL, xpc_retain(value));
}

size_t xpc_array_get_count(xpc_ref x) { return container(x, _xpc_type_array, "xpc_array_get_count")->count; }

xpc_ref xpc_array_get_value(xpc_ref x, size_t index) {
  container(x, _xpc_type_array, "xpc_array_get_value");
  if (index >= x->count)
    misuse("xpc_array_get_value: index %zu of %zu", index, x->count);
  return x->pairs[index].value;
}

const char *xpc_array_get_string(xpc_ref x, size_t index) {
  return xpc_string_get_string_ptr(xpc_array_get_value(x, index));
}

char *xpc_copy_description(xpc_ref xpc) {
  object_check(xpc, XPC, "xpc_copy_description");
  char *text = NULL;
  int made = asprintf(&text, "<stand-in xpc object %p>", (void *)xpc);
  return made < 0 ? NULL : text;
}
