"""Joining over real TLS: tokens, racing devices, and whoever stands between."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from edge_node.joining import Membership, join, presented_authority
from plutino.errors import ConfigError, SecurityError, UnreachableError
from plutino.security.certificates import make_request
from plutino.security.identity import COORDINATOR, Identity
from plutino.security.tls import Newcomer
from plutino.security.tokens import JoinToken
from plutino.wire.channel import Lane, sync_channel
from protos import security_pb2, security_pb2_grpc
from tests.integration.secure_stack import DAY_S
from tests.integration.tls_proxy import TlsProxy


def test_device_joins_with_a_key_of_its_own_under_the_id_that_the_coordinator_chose(secure_stack):
    membership = secure_stack.member("pi")

    assert Membership.read(membership.identity.parent) == membership
    assert membership.devices_address == secure_stack.addresses["devices"]
    assert membership.identity.stat().st_mode & 0o777 == 0o600
    audit = secure_stack.client.members.audit()[-1]
    assert (audit.event, audit.subject, json.loads(audit.detail)) == ("joined", membership.node_id, {"name": "pi"})


def test_fifty_racing_joins_on_one_token_give_exactly_one_certificate(secure_stack):
    token = secure_stack.token()
    start = threading.Barrier(50)

    def race(number: int) -> bytes | None:
        _, request = make_request()
        with sync_channel(token.addresses[0], Lane.CONTROL, Newcomer(secure_stack.authority.ca_pem)) as channel:
            # An empty request is refused, and the channel stands.
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                security_pb2_grpc.JoinServiceStub(channel).Join(security_pb2.JoinRequest(), timeout=30)
            start.wait(30)
            try:
                response = security_pb2_grpc.JoinServiceStub(channel).Join(
                    security_pb2.JoinRequest(
                        token_id=token.token_id, secret=token.secret, name=f"racer{number}", certificate_request=request
                    ),
                    timeout=30,
                )
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED, error
                return None
            return response.certificate

    with ThreadPoolExecutor(50) as racers:
        certificates = [won for won in racers.map(race, range(50)) if won is not None]

    assert len(certificates) == 1
    (record,) = (found for found in secure_stack.client.members.tokens() if found.token_id == token.token_id)
    assert (record.state, record.uses_left) == ("used up", 0)


def test_man_in_the_middle_of_another_authority_hears_no_word(secure_stack, stranger, tmp_path):
    proxy = TlsProxy(secure_stack.addresses["join"], stranger.identity(COORDINATOR), tmp_path)
    token = secure_stack.token()
    lured = JoinToken((proxy.address,), token.fingerprint, token.token_id, token.secret)

    with pytest.raises(SecurityError, match=r"shows another authority.*Nothing secret was sent"):
        join(lured, "pi", tmp_path)
    proxy.close()

    assert (proxy.num_stepped_in, proxy.heard) == (1, b"")
    assert join(token, "pi", tmp_path).node_id, "the token is still good"


def test_man_in_the_middle_that_steps_in_after_the_first_look_hears_no_word(secure_stack, stranger, tmp_path):
    proxy = TlsProxy(secure_stack.addresses["join"], stranger.identity(COORDINATOR), tmp_path, num_passed=1)
    token = secure_stack.token()
    lured = JoinToken((proxy.address,), token.fingerprint, token.token_id, token.secret)

    with pytest.raises((SecurityError, UnreachableError)):
        join(lured, "pi", tmp_path)
    proxy.close()

    assert proxy.num_stepped_in >= 1
    assert proxy.heard == b""
    assert join(token, "pi", tmp_path).node_id, "the token is still good"


def test_man_in_the_middle_with_our_own_devices_certificate_hears_no_word(secure_stack, tmp_path):
    """A member is no coordinator: its certificate is of the right authority, under the wrong name."""
    member = Identity.read(secure_stack.member().identity)
    proxy = TlsProxy(secure_stack.addresses["join"], member, tmp_path)
    token = secure_stack.token()
    lured = JoinToken((proxy.address,), token.fingerprint, token.token_id, token.secret)

    with pytest.raises((SecurityError, UnreachableError)):
        join(lured, "pi", tmp_path)
    proxy.close()

    assert proxy.num_stepped_in >= 2
    assert proxy.heard == b""


def test_join_goes_on_to_the_next_address_of_the_token(secure_stack, stranger, tmp_path):
    token = secure_stack.token()
    proxy = TlsProxy(secure_stack.addresses["join"], stranger.identity(COORDINATOR), tmp_path)
    many = JoinToken(("127.0.0.1:1", proxy.address, *token.addresses), token.fingerprint, token.token_id, token.secret)

    assert join(many, "pi", tmp_path).devices_address == secure_stack.addresses["devices"]
    proxy.close()


def test_join_where_nobody_listens_says_so(tmp_path):
    nowhere = JoinToken(("127.0.0.1:1",), bytes(32), "0" * 12, bytes(32))

    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
        join(nowhere, "pi", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_join_with_a_clock_that_is_days_off_is_told(secure_stack, tmp_path):
    with pytest.raises(SecurityError, match=r"clock is 72\.0 h behind"):
        join(secure_stack.token(), "pi", tmp_path, clock=lambda: time.time() - 3 * DAY_S)


def test_token_that_a_person_revoked_lets_nobody_in(secure_stack, tmp_path):
    token = secure_stack.token(uses=5)
    secure_stack.client.members.revoke_token(token.token_id[:10])

    with pytest.raises(SecurityError, match="revoked"):
        join(token, "pi", tmp_path)


def test_token_with_bounds_that_are_not_allowed_is_refused(secure_stack):
    for settings in ({"uses": 100_000}, {"ttl_s": 1e9}):
        with pytest.raises(ConfigError, match="at most"):
            secure_stack.client.members.create_token(**settings)


def test_shown_authority_is_that_of_the_state_folder(secure_stack):
    assert presented_authority(secure_stack.addresses["join"]) == secure_stack.authority.ca_pem
