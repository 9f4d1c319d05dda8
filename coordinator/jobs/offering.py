"""What a job's workers may load: the base model as it is stored, packed where the job wants that."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

from coordinator.jobs.context import JobContext
from coordinator.weights.hub_models import fetch_weights, origin_of
from coordinator.weights.model_files import offer_model
from coordinator.weights.packing import pack, packed_folder
from plutino.events import Notice
from plutino.manifest import Manifest
from plutino.random_weights import seed_of
from plutino.sizes import format_size

_TOLD_EVERY_S = 10.0


async def offer_base(context: JobContext) -> Manifest:
    """Have all weights of the base model here and hand them out; a hub model's may have to be fetched first."""
    model, loop, stop = context.spec.model, asyncio.get_running_loop(), threading.Event()
    told_at_s = time.monotonic()

    def tell(done_bytes: int, total_bytes: int) -> None:
        nonlocal told_at_s
        if time.monotonic() - told_at_s > _TOLD_EVERY_S:
            told_at_s = time.monotonic()
            text = f"the coordinator fetches {model.path}: {format_size(done_bytes)} of {format_size(total_bytes)}"
            loop.call_soon_threadsafe(context.tell_later, Notice(level="info", text=text))

    try:
        folder = await asyncio.to_thread(fetch_weights, model, on_fetched=tell, stop=stop)
    finally:
        stop.set()  # a cancelled job leaves its thread behind
    # Hashing a large model takes seconds the first time; the event loop must go on with commits meanwhile.
    origin = origin_of(model)
    manifest = await asyncio.to_thread(offer_model, context.job_dir, folder, origin=origin)
    packing = context.numerics.packing
    if (
        model.packed_by == "devices"
        or packing.is_plain
        or packing.scheme == "gptq"
        or seed_of(manifest.tensors) is not None
    ):
        return manifest
    return await _offer_packed(context, folder, manifest)


async def _offer_packed(context: JobContext, folder: Path, manifest: Manifest) -> Manifest:
    """Pack the model here, the first time that somebody asks for it so, and hand that out beside it."""
    packing, told_at_s = context.numerics.packing, time.monotonic()

    def tell(num_done: int, num_blocks: int) -> None:
        nonlocal told_at_s
        if time.monotonic() - told_at_s > _TOLD_EVERY_S:
            told_at_s = time.monotonic()
            text = f"the coordinator packs the model in {packing.scheme}: {num_done} of {num_blocks} blocks"
            context.tell_later(Notice(level="info", text=text))

    packed_dir = packed_folder(context.shadow_files.state_dir, manifest.base_hash, packing)
    await pack(folder, packed_dir, packing, on_packed=tell)
    origin = origin_of(context.spec.model)
    return await asyncio.to_thread(offer_model, context.job_dir, folder, origin=origin, packed_dir=packed_dir)
