"""Staying a member and being cut off; and that no secret is told."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import grpc
import pytest

from edge_node.cache import BlobCache
from edge_node.cache_server import CacheServer
from edge_node.joining import Membership, Renewal, join
from edge_node.network import DeviceNetwork
from plutino.errors import ConfigError, SecurityError
from plutino.security.identity import Identity, PeerName, Role
from plutino.security.tls import Credentials
from plutino.security.tokens import JoinToken
from plutino.wire.channel import Lane, sync_channel
from tests.integration.secure_stack import METHODS, SecureStack
from tests.integration.stack import ThreadAgent, wait_until


def attached(cleanup: ExitStack, secure_stack: SecureStack, membership: Membership, name: str) -> ThreadAgent:
    agent = ThreadAgent(membership.devices_address, name, membership=membership)
    cleanup.callback(agent.close)
    wait_until(lambda: state_of(secure_stack, membership) == "alive", f"{name} attaches")
    return agent


def state_of(secure_stack: SecureStack, membership: Membership) -> str:
    found = {device["agent_id"]: device["state"] for device in secure_stack.client.devices()}
    return found.get(membership.node_id, "")


def test_devices_shows_members_that_are_away_with_the_reason(secure_stack):
    membership = secure_stack.member("sleeper")
    (device,) = (device for device in secure_stack.client.devices() if device["agent_id"] == membership.node_id)

    assert (device["name"], device["state"], device["links"]) == ("sleeper", "away", [])
    assert "has not attached" in device["reason"] and device["joined_at_s"] > 0


def test_revoked_device_is_cut_off_at_once_and_stays_out_after_a_restart(tmp_path, cleanup):
    first = SecureStack(tmp_path / "state", tmp_path)
    cleanup.callback(first.close)
    membership, other = first.member("lost-phone"), first.member("pi")
    agent, kept = (
        attached(cleanup, first, member, name) for member, name in ((membership, "lost-phone"), (other, "pi"))
    )
    bulk = sync_channel(first.addresses["bulk"], Lane.BULK, Credentials(membership.identity))

    assert first.client.members.revoke_device("lost-phone") == (membership.node_id, "lost-phone")

    wait_until(lambda: any(is_refusal(error) for error in agent.refusals), "the refusal")
    assert state_of(first, membership) == "revoked"
    manifest = next(method for method in METHODS if method.name.endswith("GetManifest"))
    assert manifest.call(bulk) is grpc.StatusCode.PERMISSION_DENIED
    assert not any(is_refusal(error) for error in kept.refusals), "the other device is not disturbed"
    with pytest.raises(SecurityError, match="revoked"):
        renew(membership)
    wait_until(lambda: kept.revoked_ids == [membership.node_id], "the other device hears of it")
    kept.revoked_ids.clear()
    bulk.close()
    first.close()

    again = SecureStack(tmp_path / "state", tmp_path / "again")
    cleanup.callback(again.close)
    wait_until(lambda: state_of(again, other) == "alive", "the other device comes back")
    wait_until(lambda: kept.revoked_ids == [membership.node_id], "the other device hears of it again")
    wait_until(lambda: is_refusal(agent.refusals[-1]), "the refusal after the restart")
    assert state_of(again, membership) == ""
    assert [row.subject for row in again.client.members.audit() if row.event == "device revoked"] == [
        membership.node_id
    ]


def is_refusal(error: grpc.RpcError) -> bool:
    return error.code() is grpc.StatusCode.PERMISSION_DENIED and "revoked" in error.details()


def test_devices_refuse_those_that_they_heard_are_revoked(secure_stack, tmp_path):
    host, revoked = secure_stack.member("host"), secure_stack.member("revoked")
    network = DeviceNetwork.of_member(host.identity, host.devices_address)
    server = CacheServer(
        BlobCache(tmp_path, 1 << 20), network, lambda job_id: False, lambda caller: caller.name == revoked.node_id
    )
    holds = next(method for method in METHODS if method.name.endswith("Holds"))
    name = PeerName(host.node_id, Role.NODE)
    codes = []
    for member in (revoked, host):
        with sync_channel(server.address, Lane.BULK, Credentials(member.identity), peer=name) as channel:
            codes.append(holds.call(channel))
    server.close()

    assert codes == [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT]


def test_device_that_is_not_there_cannot_be_revoked(secure_stack):
    with pytest.raises(ConfigError, match="no device 'nobody' is a member"):
        secure_stack.client.members.revoke_device("nobody")


def renew(membership: Membership) -> None:
    import asyncio

    asyncio.run(Renewal(membership.devices_address, Credentials(membership.identity))._renew())


def test_renewed_certificate_has_a_fresh_key_and_the_same_name_and_works(secure_stack, cleanup):
    membership = secure_stack.member()
    before = Identity.read(membership.identity)

    renew(membership)

    after = Identity.read(membership.identity)
    assert after.key_pem != before.key_pem and after.certificate_pem != before.certificate_pem
    attached(cleanup, secure_stack, membership, "pi")


def test_secrets_and_keys_are_in_no_log(secure_stack, stranger, tmp_path, caplog, cleanup):
    caplog.set_level(logging.DEBUG)
    token = secure_stack.token(uses=2)
    membership = join(token, "pi", tmp_path)
    renew(membership)
    agent = attached(cleanup, secure_stack, membership, "pi")
    wrong = JoinToken(token.addresses, token.fingerprint, token.token_id, bytes(32))
    with pytest.raises(SecurityError, match="does not know this token"):
        join(wrong, "pi", tmp_path)
    secure_stack.client.members.revoke_device(membership.node_id)
    wait_until(lambda: any(is_refusal(error) for error in agent.refusals), "the refusal")

    keys = [Identity.read(membership.identity).key_pem.decode().splitlines()[1]]
    secrets = [token.encode(), token.secret.hex(), repr(token.secret), *keys]
    told = caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert membership.node_id in told, "the log was looked at"
    assert not [secret for secret in secrets if secret in told]
    for path in secure_stack.state_dir.rglob("*"):
        if path.is_file() and path.name != "authority.pem":
            content = path.read_bytes()
            assert token.secret not in content and token.encode().encode() not in content, path
