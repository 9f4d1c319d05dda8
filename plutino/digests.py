"""sha256 of every tensor of a safetensors file, computed once per file and remembered on disk.

What is remembered is keyed by the file's real path, size and modification time: reading 16 GB again for every job would
take a minute. It lies in the user's cache, so that every process of the user shares it and may delete it at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plutino.errors import ModelError
from plutino.safetensors_index import TensorEntry

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_SETTLED_AFTER_S = 2.0
"""A file changed less than this ago may change again without another time stamp, so nothing is remembered of it."""
_NUM_THREADS = max(1, min(4, os.cpu_count() or 1))

_lock = threading.Lock()
_known: dict[tuple[str, int, int], dict[str, str]] = {}


def default_digest_dir() -> Path:
    """Where this user's digests are remembered, by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "plutino" / "digests"


def tensor_digests(
    path: Path, entries: Mapping[str, TensorEntry], *, digest_dir: Path | None = None
) -> Mapping[str, str]:
    """sha256 of the given tensors of one file, by name.

    Raises:
        ModelError: the file cannot be read or becomes shorter meanwhile.
    """
    try:
        status = path.stat()
        real_path = str(path.resolve())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    key = (real_path, status.st_size, status.st_mtime_ns)
    remembered_in = (digest_dir or default_digest_dir()) / f"{hashlib.sha256(real_path.encode()).hexdigest()}.json"
    with _lock:
        known = _known.get(key)
    if known is None:
        known = _recall(remembered_in, key)
    if not entries.keys() <= known.keys():
        known = _hash_file(path, entries)
        if time.time() - status.st_mtime < _SETTLED_AFTER_S:
            return known
        _remember(remembered_in, key, known)
    with _lock:
        _known[key] = known
    return {name: known[name] for name in entries}


def hash_range(descriptor: int, start: int, end: int) -> str:
    """sha256 of bytes ``[start, end)`` of an open file; shorter files give the hash of what there is."""
    digest = hashlib.sha256()
    while start < end and (piece := os.pread(descriptor, min(_CHUNK_BYTES, end - start), start)):
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()


def _hash_file(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, str]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size < max((entry.end for entry in entries.values()), default=0):
                raise ModelError(f"{path} became shorter while it was read; download it again")
            # hashlib lets go of the interpreter, so threads hash on several cores.
            with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sha256") as executor:
                found = executor.map(lambda entry: hash_range(descriptor, entry.start, entry.end), entries.values())
                return dict(zip(entries, found, strict=True))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _recall(path: Path, key: tuple[str, int, int]) -> dict[str, str]:
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    match values:
        case {"path": str(real_path), "size": int(size), "mtime_ns": int(mtime_ns), "tensors": dict(tensors)}:
            is_same = (real_path, size, mtime_ns) == key
            return {str(name): str(digest) for name, digest in tensors.items()} if is_same else {}
        case _:
            return {}


def _remember(path: Path, key: tuple[str, int, int], tensors: Mapping[str, str]) -> None:
    values = {"path": key[0], "size": key[1], "mtime_ns": key[2], "tensors": tensors}
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(values), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s is hashed again next time: %s cannot be written (%s)", key[0], path, error)
