"""The texts that change the ruleset of a running network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network

from openvmnet.engine.linux import firewall


def test_the_chain_for_isolated_ports_is_there_only_while_one_is() -> None:
    needed, not_needed = firewall.isolation(needed=True), firewall.isolation(needed=False)
    assert needed.count("@isolated") == 2
    assert not_needed.endswith("delete chain bridge vmnet forward\n")
    assert "@isolated" not in not_needed


def test_what_is_limited_in_a_crowd_has_its_chains_and_sets() -> None:
    rules = firewall.ruleset(
        IPv4Address("10.0.0.1"), IPv4Network("10.0.0.0/8"), "5a:00:00:00:00:01", 1, prefix=IPv6Network("fd00::/64")
    )
    lines = firewall.crowd(crowded=True, ip6=True).splitlines()
    flushed = [line.split()[-1] for line in lines if line.startswith("flush chain")]
    assert len(flushed) == 6
    for chain in flushed:
        assert rules.count(f"chain {chain} {{") == 2
        assert rules.count(f"jump {chain}\n") == 2
    for line in lines:
        if line.startswith("add rule"):
            assert rules.count(f"set {line.partition('@')[2].split()[0]} {{") == 2
    assert "add rule" not in firewall.crowd(crowded=False, ip6=True)


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
