"""The texts that change the ruleset of a running network."""

from __future__ import annotations

from openvmnet.engine.linux import firewall


def test_the_chain_for_isolated_ports_is_there_only_while_one_is() -> None:
    needed, not_needed = firewall.isolation(needed=True), firewall.isolation(needed=False)
    assert needed.count("@isolated") == 2
    assert not_needed.endswith("delete chain bridge vmnet forward\n")
    assert "@isolated" not in not_needed


def test_leases_of_both_versions_are_guarded_in_one_text():
    text = firewall.guard([("10.0.0.2", "vm1"), ("fd00::2", "vm1")], [("fd00::3", "vm2")])
    assert text.splitlines() == [
        "delete element bridge vmnet leased6 { 0xfd000000000000000000000000000003 }",
        'delete element bridge vmnet owned6 { 0xfd000000000000000000000000000003 . "vm2" }',
        "add element bridge vmnet leased { 10.0.0.2 }",
        'add element bridge vmnet owned { 10.0.0.2 . "vm1" }',
        'add element bridge vmnet bulk { 10.0.0.2 . "vm1" : 4097 }',
        "add element bridge vmnet leased6 { 0xfd000000000000000000000000000002 }",
        'add element bridge vmnet owned6 { 0xfd000000000000000000000000000002 . "vm1" }',
        "flush set bridge vmnet known6",
    ]
    assert "known6" not in firewall.guard([("10.0.0.2", "vm1")], [])


def test_adding_and_removing_a_port_are_each_others_opposite():
    added = firewall.add_port("vm3", isolated=True, ip6=True)
    assert "add element ip6 vmnet ids { 4099 : 3 }" in added
    assert firewall.remove_port("vm3", isolated=True, ip6=True) == added.replace("add", "delete")


def test_counters_of_both_tables_are_summed():
    listing = [{"counter": {"name": "refused", "packets": count}} for count in (3, 4)]
    assert firewall.counters(listing) == {"refused": 7}
