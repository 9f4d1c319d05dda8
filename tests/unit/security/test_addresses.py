from __future__ import annotations

import asyncio

import pytest

from coordinator.app import CoordinatorConfig, run_coordinator
from coordinator.security import addresses
from coordinator.security.addresses import advertised_hosts, beside, dialled_here, with_port_of
from edge_node.network import DeviceNetwork, own_address_towards
from plutino.errors import ConfigError, SecurityError
from plutino.wire.channel import is_loopback


@pytest.mark.parametrize(
    ("listened", "dialled"),
    [("0.0.0.0:7420", "127.0.0.1:7420"), ("[::]:1", "127.0.0.1:1"), ("192.0.2.1:7420", "192.0.2.1:7420")],
)
def test_what_listens_everywhere_is_dialled_on_loopback_from_here(listened, dialled):
    assert dialled_here(listened) == dialled


@pytest.mark.parametrize(
    ("configured", "earlier", "taken"),
    [
        ("127.0.0.1:0", None, "127.0.0.1:0"),
        ("127.0.0.1:0", "127.0.0.1:41000", "127.0.0.1:41000"),
        ("0.0.0.0:0", "127.0.0.1:41000", "0.0.0.0:41000"),
        ("0.0.0.0:7420", "127.0.0.1:41000", "0.0.0.0:7420"),
    ],
)
def test_open_port_is_that_of_the_last_start(configured, earlier, taken):
    assert with_port_of(configured, earlier) == taken


def test_services_beside_each_other_have_ports_behind_each_other_or_any():
    assert (beside("0.0.0.0:7420", 2), beside("127.0.0.1:0", 3)) == ("0.0.0.0:7422", "127.0.0.1:0")


def test_advertised_hosts_are_the_wanted_ones_or_the_listened_one_or_those_of_the_network(monkeypatch):
    assert advertised_hosts("0.0.0.0", ["box.lan", "192.0.2.1"]) == ("box.lan", "192.0.2.1")
    assert advertised_hosts("192.0.2.1", []) == ("192.0.2.1",)
    assert not any(is_loopback(host) for host in advertised_hosts("0.0.0.0", ["192.0.2.1"]))
    monkeypatch.setattr(addresses, "_own_addresses", lambda: ())
    with pytest.raises(ConfigError, match="--advertise"):
        advertised_hosts("0.0.0.0", [])


def test_wanted_host_with_a_port_is_refused():
    with pytest.raises(ConfigError):
        advertised_hosts("0.0.0.0", ["box.lan:7420"])


def test_device_reaches_every_port_of_the_coordinator_on_the_host_it_knows(tmp_path):
    network = DeviceNetwork.of_member(tmp_path / "identity.pem", "127.0.0.1:7420")

    assert network.reached("0.0.0.0:7423") == "127.0.0.1:7423"
    assert (network.listen_host, network.advertised_host) == ("127.0.0.1", None)
    assert DeviceNetwork.from_json(network.to_json()) == network
    assert DeviceNetwork().reached("127.0.0.1:1") == "127.0.0.1:1"


def test_device_of_a_coordinator_elsewhere_listens_everywhere_and_says_the_address_on_the_way_there(tmp_path):
    network = DeviceNetwork.of_member(tmp_path / "i.pem", "192.0.2.1:7420", advertise="198.51.100.7")

    assert (network.listen_host, network.advertised_host) == ("0.0.0.0", "198.51.100.7")
    assert own_address_towards("127.0.0.1", 1) == "127.0.0.1"


@pytest.mark.parametrize("open_one", ["devices_address", "people_address"])
def test_coordinator_without_tls_beyond_loopback_is_refused_before_anything_is_written(tmp_path, open_one):
    listened = {"devices_address": "127.0.0.1:0", "people_address": "127.0.0.1:0", open_one: "0.0.0.0:0"}
    config = CoordinatorConfig(state_dir=tmp_path, engine="local", is_plaintext=True, **listened)

    with pytest.raises(SecurityError, match=r"0\.0\.0\.0:0 .* neither encrypted nor authenticated") as refused:
        asyncio.run(run_coordinator(config, lambda endpoints: pytest.fail("it listens")))

    assert refused.value.exit_code == 9
    assert list(tmp_path.iterdir()) == []
