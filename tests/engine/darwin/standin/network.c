/* Stand-in for macOS: the network objects of macOS 26: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* CoreFoundation's part: the two kinds of object that it may release. */
void CFRelease(const void *object) {
  if (!object)
    misuse("CFRelease: NULL");
  object_release((void *)object);
}

#if MACOS >= 2600

struct reservation {
  struct reservation *next;
  uint8_t mac[6];
  uint32_t address;
};

struct configuration {
  struct object object;
  uint32_t mode, mtu, subnet, mask;
  uint8_t prefix[16], prefix_length;
  bool nat44, nat66, dhcp, dns, ra;
  char external[16];
  struct rule *rules;
  struct reservation *reservations;
};

static status_t report(status_t *status, status_t value) {
  if (status)
    *status = value;
  return value;
}

static void free_rules(struct rule *rule) {
  for (struct rule *next; rule; rule = next) {
    next = rule->next;
    free(rule);
  }
}

static void configuration_end(struct object *object) {
  struct configuration *configuration = (struct configuration *)object;
  free_rules(configuration->rules);
  for (struct reservation *each = configuration->reservations, *next; each; each = next) {
    next = each->next;
    free(each);
  }
  free(configuration);
}

static void network_end(struct object *object) {
  struct network *network = (struct network *)object;
  subnet_free(network->subnet, network->mask);
  free_rules(network->rules);
  free(network);
}

struct configuration *vmnet_network_configuration_create(uint32_t mode, status_t *status) {
  if (forced("vmnet_network_configuration_create")) {
    report(status, forced("vmnet_network_configuration_create"));
    return NULL;
  }
  if (mode != HOST && mode != SHARED) {
    report(status, VMNET_INVALID_ARGUMENT);
    return NULL;
  }
  struct configuration *made = object_new(sizeof *made, CONFIGURATION, configuration_end);
  made->mode = mode;
  made->mtu = 1500;
  made->nat44 = made->nat66 = made->dhcp = made->dns = made->ra = true;
  report(status, VMNET_SUCCESS);
  return made;
}

static struct configuration *checked(void *any) { return object_check(any, CONFIGURATION, "vmnet_network_configuration"); }

status_t vmnet_network_configuration_set_external_interface(void *any, const char *name) {
  struct configuration *configuration = checked(any);
  if (configuration->mode != SHARED || !name || strlen(name) >= sizeof configuration->external)
    return VMNET_INVALID_ARGUMENT;
  strcpy(configuration->external, name);
  return VMNET_SUCCESS;
}

status_t vmnet_network_configuration_set_ipv4_subnet(
    void *any, const struct in_addr *subnet, const struct in_addr *mask) {
  struct configuration *configuration = checked(any);
  uint32_t inverse = ~ntohl(mask->s_addr), address = ntohl(subnet->s_addr);
  if ((inverse & (inverse + 1)) || inverse < 3)
    return VMNET_INVALID_ARGUMENT;
  if ((address >> 24) != 10 && (address >> 20) != 0xac1 && (address >> 16) != 0xc0a8)
    return VMNET_INVALID_ARGUMENT;
  configuration->subnet = address;
  configuration->mask = ~inverse;
  return VMNET_SUCCESS;
}

status_t vmnet_network_configuration_set_ipv6_prefix(void *any, const struct in6_addr *prefix, uint8_t length) {
  struct configuration *configuration = checked(any);
  if (length != 64 || prefix->s6_addr[0] != 0xfd)
    return VMNET_INVALID_ARGUMENT;
  memcpy(configuration->prefix, prefix, 16);
  configuration->prefix_length = length;
  return VMNET_SUCCESS;
}

status_t vmnet_network_configuration_set_mtu(void *any, uint32_t mtu) {
  if (mtu < 1280 || mtu > 65521)
    return VMNET_INVALID_ARGUMENT;
  checked(any)->mtu = mtu;
  return VMNET_SUCCESS;
}

status_t vmnet_network_configuration_add_dhcp_reservation(
    void *any, const uint8_t *mac, const struct in_addr *address) {
  struct configuration *configuration = checked(any);
  struct reservation *made = calloc(1, sizeof *made);
  made->next = configuration->reservations;
  memcpy(made->mac, mac, 6);
  made->address = ntohl(address->s_addr);
  configuration->reservations = made;
  return VMNET_SUCCESS;
}

status_t vmnet_network_configuration_add_port_forwarding_rule(void *any, uint8_t protocol, uint8_t family,
    uint16_t internal, uint16_t external, const void *address) {
  struct configuration *configuration = checked(any);
  if ((protocol != 6 && protocol != 17) || (family != AF_INET && family != AF_INET6) || !internal || !external)
    return VMNET_INVALID_ARGUMENT;
  struct rule *made = calloc(1, sizeof *made);
  *made = (struct rule){configuration->rules, protocol, family, external, internal, {0}};
  memcpy(made->address, address, family == AF_INET ? 4 : 16);
  configuration->rules = made;
  return VMNET_SUCCESS;
}

void vmnet_network_configuration_disable_nat44(void *any) { checked(any)->nat44 = false; }
void vmnet_network_configuration_disable_nat66(void *any) { checked(any)->nat66 = false; }
void vmnet_network_configuration_disable_dhcp(void *any) { checked(any)->dhcp = false; }
void vmnet_network_configuration_disable_dns_proxy(void *any) { checked(any)->dns = false; }
void vmnet_network_configuration_disable_router_advertisement(void *any) { checked(any)->ra = false; }

/* For tests: what a configuration says, by number. */
long standin_configuration(void *any, int what) {
  struct configuration *configuration = checked(any);
  const struct rule *rule = configuration->rules;
  const struct reservation *reservation = configuration->reservations;
  switch (what) {
  case 0: return configuration->nat44 | configuration->nat66 << 1 | configuration->dhcp << 2 | configuration->dns << 3 |
                 configuration->ra << 4;
  case 1: return configuration->mtu;
  case 2: return rule ? rule->external : -1;
  case 3: return rule ? rule->internal : -1;
  case 4: return reservation ? (long)reservation->address : -1;
  case 5: return reservation ? reservation->mac[5] : -1;
  case 6: return configuration->external[0] ? configuration->external[2] : -1;
  default: return rule ? rule->address[3] : -1;
  }
}

struct network *vmnet_network_create(void *any, status_t *status) {
  struct configuration *configuration = checked(any);
  struct timespec wait = {0, 5000000};
  while (setting("hang_network"))
    nanosleep(&wait, NULL);
  status_t outcome = forced("vmnet_network_create");
  if (!outcome)
    outcome = entitled() ? VMNET_SUCCESS : VMNET_MEM_FAILURE;
  bool pinned = configuration->subnet != 0;
  uint32_t subnet = configuration->subnet, mask = configuration->mask;
  if (outcome == VMNET_SUCCESS && pinned) {
    if (!(subnet & ~mask) && configuration->dhcp)
      outcome = VMNET_FAILURE; /* the subnet's own address, where the gateway's belongs */
    else
      outcome = subnet_take(configuration->mode, subnet, mask, true);
  } else if (outcome == VMNET_SUCCESS) {
    outcome = VMNET_FAILURE;
    for (uint32_t third = 2; third < 200 && outcome != VMNET_SUCCESS; third++)
      outcome = subnet_take(configuration->mode, subnet = 0xc0a80000 | third << 8, mask = 0xffffff00, true);
  }
  if (report(status, outcome) != VMNET_SUCCESS)
    return NULL;
  struct network *made = object_new(sizeof *made, NETWORK, network_end);
  made->mode = configuration->mode;
  made->mtu = configuration->mtu;
  made->subnet = subnet & mask;
  made->mask = mask;
  made->no_dhcp = !configuration->dhcp;
  made->prefix_length = 64;
  memcpy(made->prefix, configuration->prefix_length ? configuration->prefix : (const uint8_t *)"\xfd\1\2\3\4\5\6\7\0\0\0\0\0\0\0\0", 16);
  return made;
}

void vmnet_network_get_ipv4_subnet(void *any, struct in_addr *subnet, struct in_addr *mask) {
  struct network *network = object_check(any, NETWORK, "vmnet_network_get_ipv4_subnet");
  subnet->s_addr = htonl(network->subnet);
  mask->s_addr = htonl(network->mask);
}

void vmnet_network_get_ipv6_prefix(void *any, struct in6_addr *prefix, uint8_t *length) {
  struct network *network = object_check(any, NETWORK, "vmnet_network_get_ipv6_prefix");
  memcpy(prefix, network->prefix, 16);
  *length = network->prefix_length;
}

xpc_ref vmnet_network_copy_serialization(void *any, status_t *status) {
  struct network *network = object_check(any, NETWORK, "vmnet_network_copy_serialization");
  if (report(status, forced("vmnet_network_copy_serialization")) > VMNET_SUCCESS)
    return NULL;
  xpc_ref made = xpc_dictionary_create(NULL, NULL, 0);
  xpc_dictionary_set_uint64(made, "network", (uint64_t)(uintptr_t)network);
  report(status, VMNET_SUCCESS);
  return made;
}

struct network *vmnet_network_create_with_serialization(xpc_ref serialization, status_t *status) {
  uint64_t address = 0;
  if (xpc_get_type(serialization) == _xpc_type_dictionary)
    address = xpc_dictionary_get_uint64(serialization, "network");
  if (!address) {
    report(status, VMNET_INVALID_ARGUMENT);
    return NULL;
  }
  struct network *network = object_check((void *)(uintptr_t)address, NETWORK, "vmnet_network_create_with_serialization");
  object_retain(network);
  report(status, VMNET_SUCCESS);
  return network;
}
#endif
