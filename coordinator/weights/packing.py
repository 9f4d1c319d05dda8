"""Packed tensors made on the coordinator, once for each model and packing, for devices that shall get them so.

A process of its own packs (``edge_node/stage/pack_model.py``): this one stays free of torch. What it wrote lies below
the state directory until somebody deletes it, whole or not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from plutino.errors import ModelError, QuantizationError
from plutino.job.model import Packing
from plutino.safetensors_index import INDEX_FILE

FORMAT_VERSION = 1
"""Raised with every change to a scheme's packed tensors or to how they are computed."""
STALLED_AFTER_S = 900.0
"""Bounds the silence between two blocks, not the packing."""


def packed_folder(state_dir: Path, base_hash: str, packing: Packing) -> Path:
    """Where the packed tensors of a model lie."""
    of = (str(FORMAT_VERSION), base_hash, packing.scheme, packing.embedding, packing.head)
    return state_dir / "packed" / hashlib.sha256("\n".join(of).encode()).hexdigest()[:32]


async def pack(
    model_dir: Path, folder: Path, packing: Packing, *, on_packed: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Have a folder with a model's packed tensors; returns at once where it is whole.

    Args:
        model_dir: the model.
        folder: as :func:`packed_folder` gives it.
        packing: what is packed, and how.
        on_packed: told after each block of how many.

    Raises:
        QuantizationError: the model cannot be packed so.
        ModelError: the packing process failed or fell silent.
    """
    if (folder / INDEX_FILE).is_file():
        return
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        await _run(model_dir, part, packing, on_packed)
        if not (folder / INDEX_FILE).is_file():  # another job may have been quicker
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


async def _run(model_dir: Path, out_dir: Path, packing: Packing, on_packed: Callable[[int, int], None]) -> None:
    command = ("-m", "edge_node.stage.pack_model", "--model", str(model_dir), "--out", str(out_dir))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        *("--packing", packing.model_dump_json()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        while line := await asyncio.wait_for(process.stdout.readline(), STALLED_AFTER_S):
            told = json.loads(line)
            if "error" in told:
                raise QuantizationError(f"the coordinator cannot pack {model_dir}: {told['error']}")
            on_packed(told["done"], told["total"])
        status = await asyncio.wait_for(process.wait(), STALLED_AFTER_S)
        if status != 0:
            raise ModelError(
                f"packing {model_dir} on the coordinator ended with status {status}; see its log, or set "
                "model.packed_by: devices"
            )
    except asyncio.TimeoutError:
        raise ModelError(
            f"packing {model_dir} on the coordinator was silent for {STALLED_AFTER_S:.0f} s; set "
            "model.packed_by: devices"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
