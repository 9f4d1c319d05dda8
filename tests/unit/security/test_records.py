from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.security.records import RECORDS_FILE, SecurityRecords
from plutino.errors import SecurityError, StoreError


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records(tmp_path: Path, clock: Clock) -> Iterator[SecurityRecords]:
    records = SecurityRecords(tmp_path, clock)
    yield records
    records.close()


def events(records: SecurityRecords) -> list[tuple[str, str, str]]:
    return [(row.event, row.actor, row.subject) for row in records.audit()]


def test_token_lets_as_many_in_as_it_says_and_no_more(records):
    token, secret = records.create_token(uses=2, ttl_s=60, actor="person ada")

    for node_id in ("a", "b"):
        records.admit(token.token_id, secret, node_id=node_id, name="pi")
    with pytest.raises(SecurityError, match="good for 2 devices and is used up"):
        records.admit(token.token_id, secret, node_id="c", name="pi")

    assert [member.node_id for member in records.members()] == ["a", "b"]
    assert records.tokens()[0].state(1000.0) == "used up"


def test_fifty_racing_joins_on_one_token_admit_exactly_one(records):
    token, secret = records.create_token(uses=1, ttl_s=60, actor="person ada")
    start = threading.Barrier(50)

    def race(number: int) -> bool:
        start.wait(10)
        try:
            records.admit(token.token_id, secret, node_id=f"n{number}", name="pi")
        except SecurityError:
            return False
        return True

    with ThreadPoolExecutor(50) as racers:
        assert sum(racers.map(race, range(50))) == 1
    assert len(records.members()) == 1


def test_token_ends_with_its_time(records, clock):
    token, secret = records.create_token(uses=1, ttl_s=60, actor="person ada")
    clock.now_s += 60

    with pytest.raises(SecurityError, match="ended 0 s ago"):
        records.admit(token.token_id, secret, node_id="a", name="pi")
    assert records.tokens()[0].state(clock.now_s) == "expired"


def test_revoked_token_lets_nobody_in_and_keeps_who_is(records):
    token, secret = records.create_token(uses=2, ttl_s=60, actor="person ada")
    records.admit(token.token_id, secret, node_id="a", name="pi")
    records.revoke_token(token.token_id, actor="person ada")

    with pytest.raises(SecurityError, match="revoked"):
        records.admit(token.token_id, secret, node_id="b", name="pi")
    assert records.is_member("a") and not records.is_member("b")


def test_wrong_secret_and_unknown_token_get_the_same_answer_and_use_nothing_up(records):
    token, secret = records.create_token(uses=1, ttl_s=60, actor="person ada")
    answers = []
    for token_id, tried in ((token.token_id, bytes(32)), ("0" * 12, secret)):
        with pytest.raises(SecurityError) as refused:
            records.admit(token_id, tried, node_id="a", name="pi")
        answers.append(str(refused.value))

    assert answers[0] == answers[1]
    assert records.tokens()[0].uses_left == 1


def test_secret_lies_nowhere_on_the_disk(records, tmp_path):
    token, secret = records.create_token(uses=1, ttl_s=60, actor="person ada")
    records.admit(token.token_id, secret, node_id="a", name="pi")

    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert files and all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert all(secret not in path.read_bytes() and secret.hex().encode() not in path.read_bytes() for path in files)


def test_revocation_outlives_the_process_and_is_seen_by_another(records, tmp_path):
    token, secret = records.create_token(uses=1, ttl_s=60, actor="person ada")
    records.admit(token.token_id, secret, node_id="a", name="pi")
    other = SecurityRecords(tmp_path)
    assert other.is_member("a")

    records.revoke_member("a", actor="person ada")

    assert not other.is_member("a")
    other.close()
    again = SecurityRecords(tmp_path)
    assert not again.is_member("a")
    again.close()


def test_everything_that_is_decided_is_in_the_audit_with_who_did_it(records):
    token, secret = records.create_token(uses=1, ttl_s=60, actor="person ada")
    records.admit(token.token_id, secret, node_id="a", name="pi")
    records.revoke_member("a", actor="person bob")
    records.revoke_member("a", actor="person bob")
    records.revoke_token(token.token_id, actor="person ada")

    assert events(records) == [
        ("token created", "person ada", token.token_id),
        ("joined", f"token {token.token_id}", "a"),
        ("device revoked", "person bob", "a"),
        ("token revoked", "person ada", token.token_id),
    ]
    assert [row.number for row in records.audit(after=2)] == [3, 4]


def test_records_of_a_newer_version_are_refused(tmp_path):
    SecurityRecords(tmp_path).close()
    with sqlite3.connect(tmp_path / RECORDS_FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()

    with pytest.raises(StoreError, match="schema 99"):
        SecurityRecords(tmp_path)
