"""Peer: Ray Train with peft, data-parallel: ``python -m benchmarks.peers.ray_train ORDER.json FOLDER``.

As Ray's documentation has it: ``TorchTrainer`` starts a worker a device, which wraps its model by ``prepare_model``
(torch's DistributedDataParallel over gloo) and its rows by ``prepare_data_loader``, and reports after every epoch.
Optimizer, schedule and clipping are those that transformers' Trainer has by default; every worker takes the same share
of a step's rows and pads it to its longest, and DDP takes the mean of the workers' gradients, whatever their numbers of
tokens. Of plutino only what reaps processes runs in it.

**Its gradients travel over loopback**, where everybody else's pass the emulated links: gloo dials addresses that the
relay does not know. That is to Ray's advantage. So is that a worker is bound to its device's processors when its
training function begins, so that what Ray itself imports before may use all of them.

Ray's cluster belongs to this process: loopback only, no dashboard, its folder below FOLDER. SIGTERM ends all of it, and
where nobody is left to end it, the kernel ends the daemons with this process, and the workers end when they miss them.
FOLDER then has ``worker<rank>.json`` and ``driver.json``, times by the machine's monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.scheduling.ray_backend.reaping import process_tree, reap

RAY_FOLDER = "r"
"""Below FOLDER. One letter, because paths of sockets lie below it."""
OBJECT_STORE_BYTES = 80 * 2**20
"""Ray refuses less than 75 MiB; no row and no gradient passes through it."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise six of Ray's ports are open on all interfaces: it takes the machine's own address for 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Asks for the behaviour that Ray warns it will have one day; nobody here asks for an accelerator.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def main() -> None:
    """Train as the order says."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    order, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    with _cluster(folder / RAY_FOLDER, len(order["workers"])):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        up_s = time.monotonic()
        TorchTrainer(
            train,
            train_loop_config={**order, "folder": str(folder)},
            scaling_config=ScalingConfig(
                num_workers=len(order["workers"]), use_gpu=False, resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(name="peer", storage_path=str(folder / "storage")),
        ).fit()
        driver = {"cluster_up_at_s": up_s, "fitted_at_s": time.monotonic()}
    (folder / "driver.json").write_text(json.dumps(driver), encoding="utf-8")


@contextlib.contextmanager
def _cluster(folder: Path, num_cpus: int) -> Iterator[None]:
    """A Ray of this process's own; nothing of it is left afterwards."""
    os.environ.update(_ENVIRONMENT)
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
        # Ray's own handler takes no notice of the signal while it waits for a worker.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        yield
    finally:
        # Workers of a job that was cut off may compute for a while before they notice.
        processes = process_tree(os.getpid(), mark=str(folder))
        ray.shutdown()
        reap(processes)


def train(config: dict[str, Any]) -> None:
    """What each worker does; rank 0 saves the adapter."""
    began_s = time.monotonic()
    import ray.train
    from ray.train.torch import prepare_data_loader, prepare_model

    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    _settle(config["workers"][rank])
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, get_linear_schedule_with_warmup

    from benchmarks.peers.peft_job import IGNORED_LABEL, LEARNING_RATE, model_of, peak_bytes, rows_of

    torch.set_num_threads(config["workers"][rank]["threads"])
    baseline_bytes = peak_bytes()
    tokenizer = AutoTokenizer.from_pretrained(config["model_dir"])
    adapted = model_of(config)
    model = prepare_model(adapted)
    loader = prepare_data_loader(
        DataLoader(
            rows_of(config, tokenizer),  # type: ignore[arg-type]  # a list is a Dataset to torch, not to its types
            batch_size=config["batch_size"] // num_workers,
            shuffle=True,
            collate_fn=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL),
        )
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, config["epochs"] * len(loader))

    at_s: list[list[float]] = []
    losses: list[float] = []
    model.train()
    for epoch in range(config["epochs"]):
        at_s.append([time.monotonic()])
        if num_workers > 1:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # prepare_data_loader's DistributedSampler
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            at_s[-1].append(time.monotonic())
        ray.train.report({"epoch": epoch, "loss": losses[-1]})
    if rank == 0:
        adapted.save_pretrained(config["out_dir"])
    figures = {
        "began_at_s": began_s,
        "at_s": at_s,
        "saved_at_s": time.monotonic(),
        "losses": losses,
        "job_bytes": peak_bytes() - baseline_bytes,
        "rss_bytes": peak_bytes(),
    }
    (Path(config["folder"]) / f"worker{rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def _settle(place: dict[str, Any]) -> None:
    """Bind this process, all of its threads and those to come, to its device's processors and their quota."""
    if place["cgroup"] is not None:
        (Path(place["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
    # The function runs on one thread of the worker, and gloo's carry the gradients.
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread), place["cores"])


if __name__ == "__main__":
    main()
