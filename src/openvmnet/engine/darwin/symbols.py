"""Every public symbol of vmnet.framework, macOS 10.15 to 26, and those of the system that using it takes.

A function's row has its C name, the macOS that brought it, its result's and its arguments' types. The tables are read
by `openvmnet.engine.darwin.library`, which looks each symbol up by itself: a macOS that lacks one is known by its lack,
not by its version. Sources: the SDKs' headers and export lists, 10.10 to 26.1.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
i64, size, pointer, text, boolean = ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool
integer, long, ulong, uint, ssize = ctypes.c_int, ctypes.c_long, ctypes.c_ulong, ctypes.c_uint, ctypes.c_ssize_t


class InAddr(ctypes.Structure):
    """struct in_addr: four octets in network order; passed by value in one call."""

    _fields_ = (("octets", u8 * 4),)


class Function(NamedTuple):
    """One function: `since` is the macOS that brought it; `result` and `arguments` are ctypes types."""

    name: str
    since: str
    result: Any
    arguments: tuple[Any, ...]


class Key(NamedTuple):
    """One key of an XPC dictionary: a data symbol `const char *`, whose text is the symbol's without `_key`.

    `where` says which dictionaries have it: d what an interface is started with, p what that answers, e the event's.
    """

    symbol: str
    kind: Literal["uint64", "string", "bool", "uuid"]
    where: str
    since: str

    @property
    def name(self) -> str:
        """The key's own text."""
        return self.symbol.removesuffix("_key")


# Below, `pointer` stands for interface_ref, xpc_object_t, dispatch_queue_t, a block, or a pointer to a structure.
_INTERFACE = (
    Function("vmnet_start_interface", "10.10", pointer, (pointer, pointer, pointer)),
    Function("vmnet_interface_set_event_callback", "10.10", u32, (pointer, u32, pointer, pointer)),
    Function("vmnet_read", "10.10", u32, (pointer, pointer, pointer)),
    Function("vmnet_write", "10.10", u32, (pointer, pointer, pointer)),
    Function("vmnet_stop_interface", "10.10", u32, (pointer, pointer, pointer)),
    Function("vmnet_copy_shared_interface_list", "10.15", pointer, ()),
)
_RULES = (
    Function("vmnet_interface_add_port_forwarding_rule", "10.15", u32, (pointer, u8, u16, InAddr, u16, pointer)),
    Function("vmnet_interface_remove_port_forwarding_rule", "10.15", u32, (pointer, u8, u16, pointer)),
    Function("vmnet_interface_get_port_forwarding_rules", "10.15", u32, (pointer, pointer)),
    Function("vmnet_port_forwarding_rule_get_details", "10.15", u32, (pointer, pointer, pointer, pointer, pointer)),
    Function("vmnet_interface_add_ip_port_forwarding_rule", "11.0", u32, (pointer, u8, u16, u8, pointer, u16, pointer)),
    Function("vmnet_interface_remove_ip_port_forwarding_rule", "11.0", u32, (pointer, u8, u16, u8, pointer)),
    Function("vmnet_interface_get_ip_port_forwarding_rules", "11.0", u32, (pointer, u8, pointer)),
    Function(
        "vmnet_ip_port_forwarding_rule_get_details", "11.0", u32, (pointer, pointer, pointer, u8, pointer, pointer)
    ),
)
_CONFIGURATION = "vmnet_network_configuration_"
_NETWORK = (
    Function(f"{_CONFIGURATION}create", "26.0", pointer, (u32, pointer)),
    Function(f"{_CONFIGURATION}set_external_interface", "26.0", u32, (pointer, text)),
    Function(f"{_CONFIGURATION}set_ipv4_subnet", "26.0", u32, (pointer, pointer, pointer)),
    Function(f"{_CONFIGURATION}set_ipv6_prefix", "26.0", u32, (pointer, pointer, u8)),
    Function(f"{_CONFIGURATION}set_mtu", "26.0", u32, (pointer, u32)),
    Function(f"{_CONFIGURATION}add_dhcp_reservation", "26.0", u32, (pointer, pointer, pointer)),
    # The internal port comes first here, the external one in the interface's own rules.
    Function(f"{_CONFIGURATION}add_port_forwarding_rule", "26.0", u32, (pointer, u8, u8, u16, u16, pointer)),
    Function(f"{_CONFIGURATION}disable_nat44", "26.0", None, (pointer,)),
    Function(f"{_CONFIGURATION}disable_nat66", "26.0", None, (pointer,)),
    Function(f"{_CONFIGURATION}disable_dhcp", "26.0", None, (pointer,)),
    Function(f"{_CONFIGURATION}disable_dns_proxy", "26.0", None, (pointer,)),
    Function(f"{_CONFIGURATION}disable_router_advertisement", "26.0", None, (pointer,)),
    Function("vmnet_network_create", "26.0", pointer, (pointer, pointer)),
    Function("vmnet_network_get_ipv4_subnet", "26.0", None, (pointer, pointer, pointer)),
    Function("vmnet_network_get_ipv6_prefix", "26.0", None, (pointer, pointer, pointer)),
    Function("vmnet_network_copy_serialization", "26.0", pointer, (pointer, pointer)),
    Function("vmnet_network_create_with_serialization", "26.0", pointer, (pointer, pointer)),
    Function("vmnet_interface_start_with_network", "26.0", pointer, (pointer, pointer, pointer, pointer)),
)
VMNET = {function.name: function for function in (*_INTERFACE, *_RULES, *_NETWORK)}

_DISPATCH = (
    Function("dispatch_queue_create", "10.6", pointer, (text, pointer)),
    Function("dispatch_release", "10.6", None, (pointer,)),
)
_XPC = (
    Function("xpc_dictionary_create", "10.7", pointer, (pointer, pointer, size)),
    Function("xpc_dictionary_set_uint64", "10.7", None, (pointer, text, u64)),
    Function("xpc_dictionary_set_bool", "10.7", None, (pointer, text, boolean)),
    Function("xpc_dictionary_set_string", "10.7", None, (pointer, text, text)),
    Function("xpc_dictionary_set_uuid", "10.7", None, (pointer, text, text)),
    Function("xpc_dictionary_apply", "10.7", boolean, (pointer, pointer)),
    Function("xpc_get_type", "10.7", pointer, (pointer,)),
    Function("xpc_uint64_get_value", "10.7", u64, (pointer,)),
    Function("xpc_int64_get_value", "10.7", i64, (pointer,)),
    Function("xpc_bool_get_value", "10.7", boolean, (pointer,)),
    Function("xpc_string_get_string_ptr", "10.7", text, (pointer,)),
    Function("xpc_uuid_get_bytes", "10.7", pointer, (pointer,)),
    Function("xpc_array_get_count", "10.7", size, (pointer,)),
    Function("xpc_array_get_value", "10.7", pointer, (pointer, size)),
    Function("xpc_retain", "10.7", pointer, (pointer,)),
    Function("xpc_release", "10.7", None, (pointer,)),
)
_SOCKETS = (
    # Private system calls 480 and 481, exported by libsystem_kernel since 10.11.
    Function("recvmsg_x", "10.11", ssize, (integer, pointer, uint, integer)),
    Function("sendmsg_x", "10.11", ssize, (integer, pointer, uint, integer)),
)
SYSTEM = {function.name: function for function in (*_DISPATCH, *_XPC, *_SOCKETS)}
FOUNDATION = {"CFRelease": Function("CFRelease", "10.0", None, (pointer,))}

XPC_TYPES = ("uint64", "int64", "string", "bool", "uuid", "array", "dictionary")

KEYS = {
    key.name: key
    for key in (
        Key("vmnet_operation_mode_key", "uint64", "d", "10.10"),
        Key("vmnet_interface_id_key", "uuid", "dp", "10.10"),
        Key("vmnet_mac_address_key", "string", "p", "10.10"),
        Key("vmnet_mtu_key", "uint64", "dp", "10.10"),
        Key("vmnet_max_packet_size_key", "uint64", "p", "10.10"),
        Key("vmnet_estimated_packets_available_key", "uint64", "e", "10.10"),
        Key("vmnet_shared_interface_name_key", "string", "d", "10.15"),
        Key("vmnet_allocate_mac_address_key", "bool", "d", "10.15"),
        Key("vmnet_start_address_key", "string", "dp", "10.15"),
        Key("vmnet_end_address_key", "string", "dp", "10.15"),
        Key("vmnet_subnet_mask_key", "string", "dp", "10.15"),
        Key("vmnet_nat66_prefix_key", "string", "dp", "10.15"),
        Key("vmnet_nat66_prefix_length_key", "uint64", "d", "10.15"),
        Key("vmnet_network_identifier_key", "uuid", "d", "11.0"),
        Key("vmnet_host_ip_address_key", "string", "d", "11.0"),
        Key("vmnet_host_subnet_mask_key", "string", "d", "11.0"),
        Key("vmnet_host_ipv6_address_key", "string", "d", "11.0"),
        Key("vmnet_enable_tso_key", "bool", "d", "11.0"),
        Key("vmnet_enable_isolation_key", "bool", "d", "11.0"),
        Key("vmnet_enable_checksum_offload_key", "bool", "d", "12.0"),
        Key("vmnet_read_max_packets_key", "uint64", "p", "15.0"),
        Key("vmnet_write_max_packets_key", "uint64", "p", "15.0"),
        Key("vmnet_enable_virtio_header_key", "bool", "d", "15.4"),
    )
}
