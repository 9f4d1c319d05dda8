"""The tables of the SQLite store, and how an older database becomes a present one."""

from __future__ import annotations

import sqlite3

from plutino.errors import StoreError

# Entry n takes a database from version n to n + 1; never change one that was released, append another.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            sequence INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id TEXT NOT NULL UNIQUE,
            name TEXT NOT NULL,
            submitted_at_s REAL NOT NULL,
            state TEXT NOT NULL,
            reason TEXT NOT NULL,
            plan_epoch INTEGER NOT NULL,
            recoveries INTEGER NOT NULL,
            start_step INTEGER NOT NULL,
            next_step INTEGER NOT NULL,
            total_steps INTEGER NOT NULL,
            final_step INTEGER,
            best_step INTEGER,
            best_eval_loss REAL,
            evaluations_since_best INTEGER NOT NULL,
            ended_at_s REAL,
            adapter_dir TEXT,
            next_unit_serial INTEGER NOT NULL DEFAULT 1
        )""",
        # Apart from the narrow rows above, which every step rewrites.
        """CREATE TABLE documents (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            name TEXT NOT NULL,
            text TEXT NOT NULL,
            PRIMARY KEY (job_id, name)
        ) WITHOUT ROWID""",
        """CREATE TABLE idempotency_keys (
            key TEXT PRIMARY KEY,
            job_id TEXT NOT NULL REFERENCES jobs (job_id)
        ) WITHOUT ROWID""",
        """CREATE TABLE transitions (
            sequence INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            at_s REAL NOT NULL,
            event TEXT NOT NULL,
            from_state TEXT NOT NULL,
            to_state TEXT NOT NULL,
            plan_epoch INTEGER NOT NULL,
            reason TEXT NOT NULL
        )""",
        "CREATE INDEX transitions_of_job ON transitions (job_id, sequence)",
        """CREATE TABLE reservations (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            agent_id TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            PRIMARY KEY (job_id, agent_id)
        ) WITHOUT ROWID""",
        """CREATE TABLE ledger (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            plan_epoch INTEGER NOT NULL,
            step INTEGER NOT NULL,
            status TEXT NOT NULL,
            sample_indices TEXT NOT NULL,
            loss REAL,
            grad_norm REAL,
            clip_scale REAL,
            lr REAL,
            reason TEXT NOT NULL,
            PRIMARY KEY (job_id, plan_epoch, step)
        ) WITHOUT ROWID""",
        # The last guard of exactly-once: no step has two rows that are not undone.
        "CREATE UNIQUE INDEX lineage ON ledger (job_id, step) WHERE status <> 'undone'",
        """CREATE TABLE evaluations (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            step INTEGER NOT NULL,
            loss REAL NOT NULL,
            PRIMARY KEY (job_id, step)
        ) WITHOUT ROWID""",
        """CREATE TABLE shadows (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            shadow_id TEXT NOT NULL,
            step INTEGER NOT NULL,
            plan_epoch INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            parameter_names TEXT NOT NULL,
            PRIMARY KEY (job_id, shadow_id)
        ) WITHOUT ROWID""",
        """CREATE TABLE scores (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            moment TEXT NOT NULL,
            json TEXT NOT NULL,
            PRIMARY KEY (job_id, moment)
        ) WITHOUT ROWID""",
        """CREATE TABLE events (
            job_id TEXT NOT NULL REFERENCES jobs (job_id),
            number INTEGER NOT NULL,
            at_s REAL NOT NULL,
            kind TEXT NOT NULL,
            json TEXT NOT NULL,
            PRIMARY KEY (job_id, number)
        )""",
        "CREATE TABLE key_values (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    ),
)

SCHEMA_VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, database: str) -> None:
    """Bring a database to the present schema, in one transaction; a new file gets all tables.

    Raises:
        StoreError: a newer plutino wrote the database, or it belongs to another program.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection, database)
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{database} has schema {version}, this plutino knows schemas up to {SCHEMA_VERSION}; "
                "upgrade plutino or start with another state folder"
            )
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION,))
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, database: str) -> int:
    tables = {str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        connection.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        connection.execute("INSERT INTO schema_version VALUES (0)")
        return 0
    if "schema_version" not in tables:
        raise StoreError(f"{database} is a database of another program; start with another state folder")
    return int(connection.execute("SELECT version FROM schema_version").fetchone()[0])
