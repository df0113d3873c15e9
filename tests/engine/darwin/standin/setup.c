/* Stand-in for macOS: the keys, and what an interface is set up from and answers: see standin.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "standin.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#define KEY(name) const char *const name##_key = #name
KEY(vmnet_operation_mode);
KEY(vmnet_interface_id);
KEY(vmnet_mac_address);
KEY(vmnet_mtu);
KEY(vmnet_max_packet_size);
KEY(vmnet_estimated_packets_available);
KEY(vmnet_shared_interface_name);
KEY(vmnet_allocate_mac_address);
KEY(vmnet_start_address);
KEY(vmnet_end_address);
KEY(vmnet_subnet_mask);
KEY(vmnet_nat66_prefix);
KEY(vmnet_nat66_prefix_length);
#if MACOS >= 1100
KEY(vmnet_network_identifier);
KEY(vmnet_host_ip_address);
KEY(vmnet_host_subnet_mask);
KEY(vmnet_host_ipv6_address);
KEY(vmnet_enable_tso);
KEY(vmnet_enable_isolation);
#endif
#if MACOS >= 1200
KEY(vmnet_enable_checksum_offload);
#endif
#if MACOS >= 1500
KEY(vmnet_read_max_packets);
KEY(vmnet_write_max_packets);
#endif
#if MACOS >= 1504
KEY(vmnet_enable_virtio_header);
#endif

/* What a start's description says. */
static bool address_of(xpc_ref desc, const char *key, uint32_t *address) {
  const char *text = xpc_dictionary_get_string(desc, key);
  struct in_addr parsed;
  if (!text || inet_pton(AF_INET, text, &parsed) != 1)
    return false;
  *address = ntohl(parsed.s_addr);
  return true;
}

static bool private_address(uint32_t address) {
  return (address >> 24) == 10 || (address >> 20) == 0xac1 || (address >> 16) == 0xc0a8;
}

static status_t set_subnet(struct interface *interface, xpc_ref desc) {
  const char *keys[] = {vmnet_start_address_key, vmnet_end_address_key, vmnet_subnet_mask_key};
  uint32_t values[3] = {0};
  int given = 0, right = 0;
  for (int i = 0; i < 3; i++) {
    given += xpc_dictionary_get_value(desc, keys[i]) != NULL;
    right += address_of(desc, keys[i], &values[i]);
  }
  if (given && (given != 3 || right != 3))
    return VMNET_INVALID_ARGUMENT;
  uint32_t base = interface->mode == SHARED ? 0xc0a84001 : 0xc0a88001, mask = 0xffffff00;
  if (!given) {
    for (uint32_t third = 0; third < 64; third++) {
      interface->start = base + (third << 8);
      interface->mask = mask;
      if (subnet_take(interface->mode, interface->start, mask, false) == VMNET_SUCCESS)
        return interface->held = true, VMNET_SUCCESS;
    }
    return VMNET_FAILURE;
  }
  if (((~values[2]) & (~values[2] + 1)) || values[2] == 0xffffffff)
    return VMNET_INVALID_ARGUMENT;
  if (!private_address(values[0]) || !private_address(values[1]))
    return VMNET_FAILURE;
  if (values[1] <= values[0] || ((values[0] ^ values[1]) & values[2]))
    return VMNET_INVALID_ARGUMENT;
  interface->start = values[0];
  interface->mask = values[2];
  status_t status = subnet_take(interface->mode, values[0], values[2], false);
  interface->held = status == VMNET_SUCCESS;
  return status;
}

static status_t set_identifier(struct interface *interface, xpc_ref desc, bool *isolated_network) {
#if MACOS >= 1100
  *isolated_network = xpc_dictionary_get_uuid(desc, vmnet_network_identifier_key) != NULL;
  bool ip = xpc_dictionary_get_value(desc, vmnet_host_ip_address_key) != NULL;
  bool mask = xpc_dictionary_get_value(desc, vmnet_host_subnet_mask_key) != NULL;
  bool ip6 = xpc_dictionary_get_value(desc, vmnet_host_ipv6_address_key) != NULL;
  if (ip != mask || ((ip || ip6) && !*isolated_network) || (*isolated_network && interface->mode != HOST))
    return VMNET_INVALID_ARGUMENT;
#else
  (void)interface, (void)desc;
  *isolated_network = false;
#endif
  return VMNET_SUCCESS;
}

status_t set_offloads(struct interface *interface, xpc_ref desc) {
  (void)desc;
  bool tso = false, checksum = false;
#if MACOS >= 1100
  tso = xpc_dictionary_get_bool(desc, vmnet_enable_tso_key);
#endif
#if MACOS >= 1200
  checksum = xpc_dictionary_get_bool(desc, vmnet_enable_checksum_offload_key);
#endif
#if MACOS >= 1504
  interface->vnet_header = xpc_dictionary_get_bool(desc, vmnet_enable_virtio_header_key);
#endif
  if (checksum && interface->vnet_header)
    return VMNET_INVALID_ARGUMENT;
  if (tso)
    interface->largest = 65550;
  return VMNET_SUCCESS;
}

status_t set_up(struct interface *interface, xpc_ref desc) {
  if (!entitled())
    return VMNET_FAILURE;
  if (setting("sharing_busy") && interface->mode == SHARED)
    return VMNET_SHARING_SERVICE_BUSY;
  bool isolated_network;
  status_t status = set_identifier(interface, desc, &isolated_network);
  if (status != VMNET_SUCCESS)
    return status;
  bool mtu = xpc_dictionary_get_value(desc, vmnet_mtu_key) != NULL;
  interface->mtu = mtu ? (uint32_t)xpc_dictionary_get_uint64(desc, vmnet_mtu_key) : 1500;
  interface->largest = interface->mtu + 14;
  const char *name = xpc_dictionary_get_string(desc, vmnet_shared_interface_name_key);
  if (interface->mode == BRIDGED) {
    if (mtu || !name || (strcmp(name, "en0") && strcmp(name, "en1")))
      return VMNET_INVALID_ARGUMENT;
    return set_offloads(interface, desc);
  }
  if (name || interface->mtu < 1280 || interface->mtu > 65521)
    return VMNET_INVALID_ARGUMENT;
  const char *prefix = xpc_dictionary_get_string(desc, vmnet_nat66_prefix_key);
  struct in6_addr parsed;
  if (prefix && (interface->mode != SHARED || inet_pton(AF_INET6, prefix, &parsed) != 1 || parsed.s6_addr[0] != 0xfd))
    return VMNET_INVALID_ARGUMENT;
  status = set_offloads(interface, desc);
  if (status != VMNET_SUCCESS)
    return status;
  if (isolated_network && !xpc_dictionary_get_value(desc, vmnet_start_address_key))
    return VMNET_SUCCESS;
  return set_subnet(interface, desc);
}

/* What the start's handler is given. */
static void set_addresses(xpc_ref param, struct interface *interface, xpc_ref desc) {
  if (!interface->held && !interface->network)
    return;
  struct in_addr start = {htonl(interface->start)}, mask = {htonl(interface->mask)};
  struct in_addr end = {htonl((interface->start | ~interface->mask) - 1)};
  char text[INET6_ADDRSTRLEN];
  const char *wanted = xpc_dictionary_get_string(desc, vmnet_end_address_key);
  xpc_dictionary_set_string(param, vmnet_start_address_key, inet_ntop(AF_INET, &start, text, sizeof text));
  xpc_dictionary_set_string(param, vmnet_subnet_mask_key, inet_ntop(AF_INET, &mask, text, sizeof text));
  xpc_dictionary_set_string(
      param, vmnet_end_address_key, wanted ? wanted : inet_ntop(AF_INET, &end, text, sizeof text));
  const char *prefix = xpc_dictionary_get_string(desc, vmnet_nat66_prefix_key);
  if (interface->mode == SHARED)
    xpc_dictionary_set_string(param, vmnet_nat66_prefix_key, prefix ? prefix : "fd0c:5f2a:1111:2222::");
}

xpc_ref parameters(struct interface *interface, xpc_ref desc) {
  xpc_ref param = xpc_dictionary_create(NULL, NULL, 0);
  xpc_dictionary_set_uint64(param, vmnet_mtu_key, interface->mtu);
  xpc_dictionary_set_uint64(param, vmnet_max_packet_size_key, interface->largest);
#if MACOS >= 1500
  xpc_dictionary_set_uint64(param, vmnet_read_max_packets_key, interface->limit);
  xpc_dictionary_set_uint64(param, vmnet_write_max_packets_key, interface->limit);
#endif
  uint8_t id[16];
  const uint8_t *given = interface->network ? NULL : xpc_dictionary_get_uuid(desc, vmnet_interface_id_key);
  if (given)
    memcpy(id, given, 16);
  else if (getrandom(id, 16, 0) != 16)
    misuse("no random octets");
  xpc_dictionary_set_uuid(param, vmnet_interface_id_key, id);
  xpc_ref allocate = xpc_dictionary_get_value(desc, vmnet_allocate_mac_address_key);
  if (!allocate || interface->network || xpc_dictionary_get_bool(desc, vmnet_allocate_mac_address_key)) {
    char mac[18];
    snprintf(mac, sizeof mac, "%02x:%02x:%02x:%02x:%02x:%02x", (id[0] & 0xfc) | 2, id[1], id[2], id[3], id[4], id[5]);
    xpc_dictionary_set_string(param, vmnet_mac_address_key, mac);
  }
  set_addresses(param, interface, desc);
  return param;
}

