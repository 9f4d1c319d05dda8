"""Ids of jobs: made from a name, found from their beginning."""

from __future__ import annotations

import secrets

from coordinator.jobs.record import JobRecord
from coordinator.storage.base import Store
from plutino.errors import UnknownJobError


def new_job_id(name: str) -> str:
    """A short id that says what it is: the name's first letters and six random characters."""
    letters = "".join(c for c in name.lower() if c.isalnum() or c == "-")[:20].strip("-") or "job"
    return f"{letters}-{secrets.token_hex(3)}"


def find_job(store: Store, text: str) -> JobRecord:
    """The job with this id, or the only one whose id starts so.

    Raises:
        UnknownJobError: none, or several.
    """
    records = store.jobs()
    exact = [record for record in records if record.job_id == text]
    found = exact or [record for record in records if record.job_id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if not found:
        known = ", ".join(str(record.job_id) for record in records[-5:]) or "there are no jobs"
        raise UnknownJobError(f"no job {text!r}; the latest: {known}")
    raise UnknownJobError(f"{text!r} fits {len(found)} jobs: {', '.join(str(r.job_id) for r in found[:5])}")
