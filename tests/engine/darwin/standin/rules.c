/* Stand-in for macOS: port forwarding by the interface, and the table of taken subnets: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

xpc_ref xpc_uint64_create(uint64_t value);
xpc_ref xpc_uuid_create(const uint8_t *value);

/* Whoever asks counts as root, unless standin_set("not_root", 1); then from 26 on "entitled" is enough. */
bool entitled(void) { return !setting("not_root") || (MACOS >= 2600 && setting("entitled")); }

/* A subnet belongs to one mode; an exclusive one (of a network object that pinned it) to that network alone. */
#define MOST 64
static struct taken {
  uint32_t mode, start, mask;
  int users;
  bool exclusive;
} taken[MOST];
static pthread_mutex_t taken_lock = PTHREAD_MUTEX_INITIALIZER;

status_t subnet_take(uint32_t mode, uint32_t start, uint32_t mask, bool exclusive) {
  status_t status = VMNET_SUCCESS;
  pthread_mutex_lock(&taken_lock);
  struct taken *same = NULL, *empty = NULL;
  for (struct taken *each = taken; each < taken + MOST; each++) {
    if (!each->users) {
      empty = empty ? empty : each;
      continue;
    }
    uint32_t narrower = mask & each->mask;
    if ((start & narrower) != (each->start & narrower))
      continue;
    if (each->mode != mode || each->mask != mask || each->exclusive || exclusive)
      status = VMNET_FAILURE;
    else
      same = each;
  }
  if (status == VMNET_SUCCESS) {
    same = same ? same : empty;
    if (!same)
      misuse("more than %d subnets", MOST);
    *same = (struct taken){mode, start, mask, same->users + 1, exclusive};
  }
  pthread_mutex_unlock(&taken_lock);
  return status;
}

void subnet_free(uint32_t start, uint32_t mask) {
  pthread_mutex_lock(&taken_lock);
  for (struct taken *each = taken; each < taken + MOST; each++)
    if (each->users && (each->start & mask) == (start & mask)) {
      each->users--;
      break;
    }
  pthread_mutex_unlock(&taken_lock);
}

/* Rules. */
struct answer {
  struct block *block;
  status_t status;
  xpc_ref list;
};

static void answer(void *any) {
  struct answer *answer = any;
  if (answer->status)
    completion(answer->block, answer->status);
  else
    ((void (*)(struct block *, xpc_ref))answer->block->invoke)(answer->block, answer->list);
  if (answer->list)
    xpc_release(answer->list);
  _Block_release(answer->block);
  free(answer);
}

static void answer_later(struct block *block, status_t status, xpc_ref list) {
  if (!block)
    return;
  struct answer *made = malloc(sizeof *made);
  *made = (struct answer){_Block_copy(block), status, list};
  queue_submit(dispatch_get_global_queue(0, 0), answer, made);
}

static struct interface *running(struct interface *interface, const char *function, status_t *status) {
  interface_check(interface, function);
  *status = forced(function);
  if (!*status)
    *status = interface->state == 2 ? VMNET_SUCCESS : VMNET_SETUP_INCOMPLETE;
  return interface;
}

static struct rule **rule_find(struct interface *interface, uint8_t protocol, uint16_t external, uint8_t family) {
  struct rule **at = &interface->rules;
  while (*at && ((*at)->protocol != protocol || (*at)->external != external || (*at)->family != family))
    at = &(*at)->next;
  return at;
}

static status_t rule_add(struct interface *interface, struct rule wanted) {
  if ((wanted.protocol != 6 && wanted.protocol != 17) || !wanted.external || !wanted.internal)
    return VMNET_INVALID_ARGUMENT;
  if (wanted.family != AF_INET && wanted.family != AF_INET6)
    return VMNET_INVALID_ARGUMENT;
  if (interface->mode != SHARED)
    return VMNET_INVALID_ARGUMENT;
  pthread_mutex_lock(&interface->lock);
  struct rule **at = rule_find(interface, wanted.protocol, wanted.external, wanted.family);
  status_t status = *at ? VMNET_FAILURE : VMNET_SUCCESS;
  if (!*at) {
    *at = malloc(sizeof **at);
    **at = wanted;
  }
  pthread_mutex_unlock(&interface->lock);
  return status;
}

static status_t rule_remove(struct interface *interface, uint8_t protocol, uint16_t external, uint8_t family) {
  pthread_mutex_lock(&interface->lock);
  struct rule **at = rule_find(interface, protocol, external, family), *gone = *at;
  if (gone)
    *at = gone->next;
  pthread_mutex_unlock(&interface->lock);
  free(gone);
  return gone ? VMNET_SUCCESS : VMNET_INVALID_ARGUMENT;
}

static xpc_ref rule_list(struct interface *interface, uint8_t family) {
  xpc_ref list = NULL;
  pthread_mutex_lock(&interface->lock);
  for (struct rule *rule = interface->rules; rule; rule = rule->next) {
    if (rule->family != family)
      continue;
    if (!list)
      list = xpc_array_create(NULL, 0);
    xpc_ref each = xpc_dictionary_create(NULL, NULL, 0);
    xpc_dictionary_set_uint64(each, "protocol", rule->protocol);
    xpc_dictionary_set_uint64(each, "family", rule->family);
    xpc_dictionary_set_uint64(each, "external", rule->external);
    xpc_dictionary_set_uint64(each, "internal", rule->internal);
    xpc_dictionary_set_uuid(each, "address", rule->address);
    xpc_array_append_value(list, each);
    xpc_release(each);
  }
  pthread_mutex_unlock(&interface->lock);
  return list;
}

static status_t rule_details(
    xpc_ref rule, uint8_t *protocol, uint16_t *external, uint8_t family, void *address, uint16_t *internal) {
  if (xpc_get_type(rule) != _xpc_type_dictionary || xpc_dictionary_get_uint64(rule, "family") != family)
    return VMNET_INVALID_ARGUMENT;
  *protocol = (uint8_t)xpc_dictionary_get_uint64(rule, "protocol");
  *external = (uint16_t)xpc_dictionary_get_uint64(rule, "external");
  *internal = (uint16_t)xpc_dictionary_get_uint64(rule, "internal");
  memcpy(address, xpc_dictionary_get_uuid(rule, "address"), family == AF_INET ? 4 : 16);
  return VMNET_SUCCESS;
}

/* The API of 10.15. */
status_t vmnet_interface_add_port_forwarding_rule(struct interface *interface, uint8_t protocol, uint16_t external,
    struct in_addr address, uint16_t internal, struct block *handler) {
  status_t status;
  running(interface, "vmnet_interface_add_port_forwarding_rule", &status);
  if (status != VMNET_SUCCESS)
    return status;
  struct rule rule = {NULL, protocol, AF_INET, external, internal, {0}};
  memcpy(rule.address, &address, 4);
  answer_later(handler, rule_add(interface, rule), NULL);
  return VMNET_SUCCESS;
}

status_t vmnet_interface_remove_port_forwarding_rule(
    struct interface *interface, uint8_t protocol, uint16_t external, struct block *handler) {
  status_t status;
  running(interface, "vmnet_interface_remove_port_forwarding_rule", &status);
  if (status == VMNET_SUCCESS)
    answer_later(handler, rule_remove(interface, protocol, external, AF_INET), NULL);
  return status;
}

status_t vmnet_interface_get_port_forwarding_rules(struct interface *interface, struct block *handler) {
  status_t status;
  running(interface, "vmnet_interface_get_port_forwarding_rules", &status);
  if (status == VMNET_SUCCESS)
    answer_later(handler, 0, rule_list(interface, AF_INET));
  return status;
}

status_t vmnet_port_forwarding_rule_get_details(
    xpc_ref rule, uint8_t *protocol, uint16_t *external, struct in_addr *address, uint16_t *internal) {
  return rule_details(rule, protocol, external, AF_INET, address, internal);
}

/* The API with both families. */
#if MACOS >= 1200
status_t vmnet_interface_add_ip_port_forwarding_rule(struct interface *interface, uint8_t protocol, uint16_t external,
    uint8_t family, const void *address, uint16_t internal, struct block *handler) {
  status_t status;
  running(interface, "vmnet_interface_add_ip_port_forwarding_rule", &status);
  if (status != VMNET_SUCCESS)
    return status;
  struct rule rule = {NULL, protocol, family, external, internal, {0}};
  memcpy(rule.address, address, family == AF_INET6 ? 16 : 4);
  answer_later(handler, rule_add(interface, rule), NULL);
  return VMNET_SUCCESS;
}

status_t vmnet_interface_remove_ip_port_forwarding_rule(
    struct interface *interface, uint8_t protocol, uint16_t external, uint8_t family, struct block *handler) {
  status_t status;
  running(interface, "vmnet_interface_remove_ip_port_forwarding_rule", &status);
  if (status == VMNET_SUCCESS)
    answer_later(handler, rule_remove(interface, protocol, external, family), NULL);
  return status;
}

status_t vmnet_interface_get_ip_port_forwarding_rules(
    struct interface *interface, uint8_t family, struct block *handler) {
  status_t status;
  running(interface, "vmnet_interface_get_ip_port_forwarding_rules", &status);
  if (status == VMNET_SUCCESS)
    answer_later(handler, 0, rule_list(interface, family));
  return status;
}

status_t vmnet_ip_port_forwarding_rule_get_details(
    xpc_ref rule, uint8_t *protocol, uint16_t *external, uint8_t family, void *address, uint16_t *internal) {
  return rule_details(rule, protocol, external, family, address, internal);
}
#endif
