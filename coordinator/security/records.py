"""Who may be in, on disk: join tokens, members, revocations, and the audit of all that.

A database of its own beside the jobs' one, because the bulk process reads revocations from it. SQLite in WAL mode with
``synchronous=FULL``: a revocation that was confirmed survives a power cut. Every change is one transaction with its row
of the audit. Methods block for a few milliseconds and may be called from any thread.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plutino.errors import SecurityError, StoreError
from plutino.security.tokens import hash_secret, is_secret, new_salt, new_secret, new_token_id

RECORDS_FILE = "security.sqlite"
_BUSY_TIMEOUT_S = 10.0
_SCHEMA = 1
_MAX_AUDIT_ROWS = 1000

_TABLES = (
    """CREATE TABLE tokens (
        token_id TEXT PRIMARY KEY,
        salt BLOB NOT NULL,
        secret_hash BLOB NOT NULL,
        uses INTEGER NOT NULL,
        uses_left INTEGER NOT NULL CHECK (uses_left >= 0),
        created_at_s REAL NOT NULL,
        expires_at_s REAL NOT NULL,
        revoked_at_s REAL
    ) WITHOUT ROWID""",
    """CREATE TABLE members (
        node_id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        token_id TEXT NOT NULL,
        joined_at_s REAL NOT NULL,
        renewed_at_s REAL NOT NULL,
        revoked_at_s REAL
    ) WITHOUT ROWID""",
    """CREATE TABLE audit (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        at_s REAL NOT NULL,
        event TEXT NOT NULL,
        actor TEXT NOT NULL,
        subject TEXT NOT NULL,
        detail TEXT NOT NULL
    )""",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """A join token as it is kept: without its secret."""

    token_id: str
    uses: int
    uses_left: int
    created_at_s: float
    expires_at_s: float
    revoked_at_s: float | None

    def state(self, now_s: float) -> str:
        """usable, used up, expired or revoked."""
        if self.revoked_at_s is not None:
            return "revoked"
        if self.uses_left == 0:
            return "used up"
        return "expired" if now_s >= self.expires_at_s else "usable"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """A device that has joined."""

    node_id: str
    name: str
    joined_at_s: float
    renewed_at_s: float
    """When it last got a certificate."""
    revoked_at_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One thing that happened."""

    number: int
    at_s: float
    event: str
    actor: str
    subject: str
    detail: str


class SecurityRecords:
    """The database of a folder; close it.

    Raises:
        StoreError: the file is damaged or of a newer version.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        path = folder / RECORDS_FILE
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Before SQLite makes it with the modes of the user's mask; its companions take over this file's mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except sqlite3.Error as error:
            self._connection.close()
            raise StoreError(
                f"{path} cannot be used ({error}); restore it, or remove it: devices join again"
            ) from error

    def close(self) -> None:
        """Let the file go."""
        with self._lock:
            self._connection.close()

    # ---- tokens ----

    def create_token(self, *, uses: int, ttl_s: float, actor: str) -> tuple[TokenRecord, bytes]:
        """A new token and its secret, which is not kept."""
        secret, salt, now_s = new_secret(), new_salt(), self._clock()
        record = TokenRecord(
            token_id=new_token_id(),
            uses=uses,
            uses_left=uses,
            created_at_s=now_s,
            expires_at_s=now_s + ttl_s,
            revoked_at_s=None,
        )
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (record.token_id, salt, hash_secret(salt, secret), uses, uses, now_s, record.expires_at_s),
            )
            self._audit(connection, "token created", actor, record.token_id, uses=uses, ttl_s=ttl_s)
        return record, secret

    def tokens(self) -> tuple[TokenRecord, ...]:
        """All tokens, the oldest first."""
        columns = "token_id, uses, uses_left, created_at_s, expires_at_s, revoked_at_s"
        with self._lock:
            rows = self._connection.execute(f"SELECT {columns} FROM tokens ORDER BY created_at_s").fetchall()
        return tuple(
            TokenRecord(
                token_id=row[0],
                uses=row[1],
                uses_left=row[2],
                created_at_s=row[3],
                expires_at_s=row[4],
                revoked_at_s=row[5],
            )
            for row in rows
        )

    def revoke_token(self, token_id: str, *, actor: str) -> None:
        """Let nobody join with a token any more; members that did stay."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE tokens SET revoked_at_s = ? WHERE token_id = ? AND revoked_at_s IS NULL",
                (self._clock(), token_id),
            )
            self._audit(connection, "token revoked", actor, token_id)

    def admit(self, token_id: str, secret: bytes, *, node_id: str, name: str) -> None:
        """Use a token up for one device, which becomes a member.

        Raises:
            SecurityError: the token lets nobody in (any more); nothing is written.
        """
        now_s = self._clock()
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT salt, secret_hash, uses, uses_left, expires_at_s, revoked_at_s FROM tokens WHERE token_id = ?",
                (token_id,),
            ).fetchone()
            # One answer for ids that are unknown and secrets that are wrong: a stranger learns nothing from it.
            if row is None or not is_secret(row[0], row[1], secret):
                raise SecurityError("the coordinator does not know this token; make another one: plutino token create")
            uses, uses_left, expires_at_s, revoked_at_s = row[2:]
            if revoked_at_s is not None:
                raise SecurityError("this token was revoked; make another one: plutino token create")
            if now_s >= expires_at_s:
                raise SecurityError(
                    f"this token ended {now_s - expires_at_s:.0f} s ago; make another one: plutino token create"
                )
            if uses_left == 0:
                raise SecurityError(
                    f"this token was good for {uses} {'device' if uses == 1 else 'devices'} and is used up; "
                    "make another one: plutino token create"
                )
            connection.execute("UPDATE tokens SET uses_left = uses_left - 1 WHERE token_id = ?", (token_id,))
            connection.execute(
                "INSERT INTO members VALUES (?, ?, ?, ?, ?, NULL)", (node_id, name, token_id, now_s, now_s)
            )
            self._audit(connection, "joined", f"token {token_id}", node_id, name=name)

    # ---- members ----

    def members(self) -> tuple[MemberRecord, ...]:
        """All devices that ever joined, the first one first."""
        columns = "node_id, name, joined_at_s, renewed_at_s, revoked_at_s"
        with self._lock:
            rows = self._connection.execute(f"SELECT {columns} FROM members ORDER BY joined_at_s, node_id").fetchall()
        return tuple(
            MemberRecord(node_id=row[0], name=row[1], joined_at_s=row[2], renewed_at_s=row[3], revoked_at_s=row[4])
            for row in rows
        )

    def renewed(self, node_id: str) -> None:
        """A member got its next certificate."""
        with self._transaction() as connection:
            connection.execute("UPDATE members SET renewed_at_s = ? WHERE node_id = ?", (self._clock(), node_id))

    def revoke_member(self, node_id: str, *, actor: str) -> None:
        """Shut a member out for good; the same one again is harmless."""
        with self._transaction() as connection:
            changed = connection.execute(
                "UPDATE members SET revoked_at_s = ? WHERE node_id = ? AND revoked_at_s IS NULL",
                (self._clock(), node_id),
            )
            if changed.rowcount:
                self._audit(connection, "device revoked", actor, node_id)

    def is_member(self, node_id: str) -> bool:
        """Whether a device has joined and was not revoked."""
        with self._lock:
            found = self._connection.execute(
                "SELECT 1 FROM members WHERE node_id = ? AND revoked_at_s IS NULL", (node_id,)
            ).fetchone()
        return found is not None

    # ---- audit ----

    def audit(self, *, after: int = 0) -> tuple[AuditRecord, ...]:
        """Rows with a larger number, at most a thousand."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT number, at_s, event, actor, subject, detail FROM audit"
                " WHERE number > ? ORDER BY number LIMIT ?",
                (after, _MAX_AUDIT_ROWS),
            ).fetchall()
        return tuple(
            AuditRecord(number=row[0], at_s=row[1], event=row[2], actor=row[3], subject=row[4], detail=row[5])
            for row in rows
        )

    def _audit(self, connection: sqlite3.Connection, event: str, actor: str, subject: str, **detail: object) -> None:
        connection.execute(
            "INSERT INTO audit (at_s, event, actor, subject, detail) VALUES (?, ?, ?, ?, ?)",
            (self._clock(), event, actor, subject, json.dumps(detail) if detail else ""),
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                except BaseException:
                    self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreError(f"the security records cannot be written ({error}); free or mend the disk") from error

    def _migrate(self, path: Path) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > _SCHEMA:
            self._connection.execute("ROLLBACK")
            raise StoreError(f"{path} has schema {version}, this plutino knows up to {_SCHEMA}; upgrade plutino")
        if version == 0:
            for statement in _TABLES:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {_SCHEMA}")
        self._connection.execute("COMMIT")
