"""Hub models on the coordinator: pin a revision, fetch what planning needs, and later the weights.

Layout of a model's folder, below the user's cache::

    config.json, tokenizer.json, ...        small files, fetched when a job is submitted
    headers/*.safetensors                   headers only; the rest of each file is a hole of its full length
    *.safetensors, *.index.json             the weights, each named only when it is whole and checked
    *.part                                  being fetched; gone on with after whatever ended the fetching

The coordinator keeps a whole copy on its disk: it hashes every tensor, serves devices that do not reach the hub, and
verifies the adapter against it. Nothing of it is held in memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.weights.model_files import is_served
from plutino.errors import ModelError
from plutino.hub import HubClient, HubError, HubFile, HubModel
from plutino.hub_id import HEADERS, HubId, model_folder, parse_hub_id
from plutino.job.model import ModelConfig
from plutino.manifest import HubOrigin
from plutino.safetensors_index import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE
from plutino.sizes import MIB, format_size

_MAX_SMALL_BYTES = 64 * MIB
_NUM_ATTEMPTS = 5
_FIRST_BACKOFF_S = 0.5
_LOCK_POLL_S = 0.2

OnFetched = Callable[[int, int], None]
"""Told bytes fetched and bytes in all."""


def origin_of(model: ModelConfig) -> HubOrigin | None:
    """Where on the hub a pinned model lies; None for a folder."""
    hub_id = parse_hub_id(model.path)
    return None if hub_id is None else HubOrigin(hub_id.repository, hub_id.revision)


def pin_model(model: ModelConfig, *, make_client: Callable[[], HubClient] = HubClient) -> ModelConfig:
    """The model with its revision replaced by the commit that it is now, its small files and headers fetched.

    A folder is given back as it is.

    Raises:
        HubError: there is no such model, it is gated, or the hub does not answer.
        ModelError: it has no safetensors, or a file is larger than it may be.
    """
    hub_id = parse_hub_id(model.path)
    if hub_id is None:
        return model
    client = make_client()
    try:
        if hub_id.is_pinned and _has_metadata(model_folder(model.path)):
            return model
        found = client.describe(hub_id)
        pinned = HubId(hub_id.repository, found.commit)
        folder = model_folder(str(pinned))
        with _locked(folder, threading.Event()):
            if not _has_metadata(folder):
                _fetch_metadata(client, pinned, found, folder)
        return model.model_copy(update={"path": str(pinned)})
    finally:
        client.close()


def fetch_weights(
    model: ModelConfig,
    *,
    on_fetched: OnFetched = lambda done, total: None,
    stop: threading.Event | None = None,
    make_client: Callable[[], HubClient] = HubClient,
) -> Path:
    """The model's folder with all its weights; fetches those of a hub model that are not here yet.

    Raises:
        HubError: the hub does not give them.
        ModelError: the disk has no room, the bytes are not those the hub announced, or ``stop`` was set.
    """
    folder = model_folder(model.path)
    hub_id = parse_hub_id(model.path)
    if hub_id is None or not (folder / HEADERS).is_dir():
        return folder
    stop = stop or threading.Event()
    client = make_client()
    try:
        with _locked(folder, stop):
            found = client.describe(hub_id)
            names = sorted(path.name for path in (folder / HEADERS).iterdir() if path.suffix == ".safetensors")
            missing = [name for name in names if not (folder / name).is_file()]
            _require_room(folder, [(name, found.files[name]) for name in missing])
            total_bytes = sum(found.files[name].num_bytes for name in names)
            done = sum(found.files[name].num_bytes for name in names if name not in missing)
            for name in missing:
                base = done
                _fetch_file(
                    client,
                    hub_id,
                    name,
                    found.files[name],
                    folder,
                    stop,
                    lambda count, base=base: on_fetched(base + count, total_bytes),  # type: ignore[misc]
                )
                done += found.files[name].num_bytes
            if (folder / HEADERS / INDEX_FILE).is_file():
                shutil.copyfile(folder / HEADERS / INDEX_FILE, folder / f"{INDEX_FILE}.part")
                os.replace(folder / f"{INDEX_FILE}.part", folder / INDEX_FILE)
            # Last: from now on the weights themselves are what is read.
            shutil.rmtree(folder / HEADERS)
    finally:
        client.close()
    return folder


def _has_metadata(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _fetch_metadata(client: HubClient, hub_id: HubId, found: HubModel, folder: Path) -> None:
    served = {name: file for name, file in found.files.items() if is_served(name)}
    if SINGLE_FILE in served:
        weights = [SINGLE_FILE]
    elif INDEX_FILE in served:
        weights = [name for name in served if name.endswith(".safetensors")]
    else:
        others = ", ".join(sorted(name for name in found.files if name.endswith((".bin", ".gguf", ".pt")))[:3])
        raise ModelError(
            f"{hub_id} has no safetensors weights{f' (only {others})' if others else ''}; choose a revision or a copy "
            "that has, or load it once with transformers and save_pretrained it into a folder"
        )
    small = [name for name in served if not name.endswith(".safetensors") and name not in (INDEX_FILE, "config.json")]
    headers = folder / HEADERS
    headers.mkdir(parents=True, exist_ok=True)
    for name in small:
        (folder / name).write_bytes(_small(client, hub_id, name, served[name]))
    if SINGLE_FILE not in weights:
        (headers / INDEX_FILE).write_bytes(_small(client, hub_id, INDEX_FILE, served[INDEX_FILE]))
    for name in weights:
        _fetch_header(client, hub_id, name, served[name], headers / name)
    if "config.json" not in served:
        raise ModelError(f"{hub_id} has no config.json; it is no transformers model")
    config = _small(client, hub_id, "config.json", served["config.json"])
    # Last: who finds it finds everything.
    (folder / "config.json.part").write_bytes(config)
    os.replace(folder / "config.json.part", folder / "config.json")


def _fetch_header(client: HubClient, hub_id: HubId, name: str, file: HubFile, path: Path) -> None:
    start = b"".join(client.stream(hub_id, name, 0, min(8, file.num_bytes)))
    header_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or header_bytes > min(MAX_HEADER_BYTES, file.num_bytes - 8):
        raise ModelError(f"{name} of {hub_id} is no safetensors file; do not use this model")
    with path.open("wb") as target:
        target.write(start)
        for piece in client.stream(hub_id, name, 8, 8 + header_bytes):
            target.write(piece)
        target.truncate(file.num_bytes)


def _small(client: HubClient, hub_id: HubId, name: str, file: HubFile) -> bytes:
    if file.num_bytes > _MAX_SMALL_BYTES:
        raise ModelError(
            f"{name} of {hub_id} has {format_size(file.num_bytes)}, more than {format_size(_MAX_SMALL_BYTES)}"
        )
    return b"".join(client.stream(hub_id, name, 0, file.num_bytes))


def _require_room(folder: Path, missing: list[tuple[str, HubFile]]) -> None:
    here_bytes = sum(path.stat().st_size for path in folder.glob("*.part"))
    needed_bytes = sum(file.num_bytes for _, file in missing) - here_bytes
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise ModelError(
            f"the model's weights need {format_size(needed_bytes)} more, the disk of {folder} has "
            f"{format_size(free_bytes)} free; free some, or let XDG_CACHE_HOME name another disk"
        )


def _fetch_file(
    client: HubClient,
    hub_id: HubId,
    name: str,
    file: HubFile,
    folder: Path,
    stop: threading.Event,
    on_count: Callable[[int], None],
) -> None:
    part, digest, attempts = folder / f"{name}.part", hashlib.sha256(), 0
    with part.open("a+b") as target:
        target.seek(0)
        while piece := target.read(MIB):
            digest.update(piece)
        if target.tell() > file.num_bytes:
            target.truncate(0)
            digest = hashlib.sha256()
        while (at := target.tell()) < file.num_bytes:
            try:
                for piece in client.stream(hub_id, name, at, file.num_bytes):
                    target.write(piece)
                    digest.update(piece)
                    on_count(target.tell())
                    if stop.is_set():
                        raise ModelError(f"fetching {hub_id} was stopped; the next job goes on with it")
            except HubError as error:
                attempts = 1 if target.tell() > at else attempts + 1
                if error.is_final or attempts == _NUM_ATTEMPTS:
                    raise
                stop.wait(_FIRST_BACKOFF_S * 2 ** (attempts - 1))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ModelError(
                    f"the disk of {folder} is full while {name} is fetched; free some space and submit the job again, "
                    "which goes on where it stopped"
                ) from error
    if file.sha256 is not None and digest.hexdigest() != file.sha256:
        part.unlink()
        raise ModelError(
            f"{name} of {hub_id} came with sha256 {digest.hexdigest()[:12]}, the hub announces {file.sha256[:12]}; "
            "it was dropped: submit the job again"
        )
    os.replace(part, folder / name)


@contextmanager
def _locked(folder: Path, stop: threading.Event) -> Iterator[None]:
    """Alone among all processes and threads that fetch this model."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.is_set():
                    raise ModelError("waiting for another job's fetching was stopped") from None
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
