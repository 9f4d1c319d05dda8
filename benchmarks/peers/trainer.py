"""Peer: transformers' own Trainer with peft on one device: ``python -m benchmarks.peers.trainer ORDER.json OUT.json``.

Nothing of plutino runs in it but the reading of figures. What it trains: :mod:`benchmarks.peers.peft_job`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cores import pinned
from benchmarks.pac_figures import RunFigures


def train_apart(
    order: Mapping[str, Any], work: Path, *, cores: Sequence[int], threads: int, timeout_s: float
) -> RunFigures:
    """Run it in a process of its own on these processors; the clock begins with the process.

    Raises:
        CalledProcessError, TimeoutExpired: it failed, or took too long.
    """
    order_path, out_path = work / "order.json", work / "figures.json"
    order_path.write_text(json.dumps(order), encoding="utf-8")
    started_s = time.monotonic()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "benchmarks.peers.trainer", str(order_path), str(out_path)]
    with pinned(cores):
        subprocess.run(command, check=True, timeout=timeout_s, env=environment)
    total_s = time.monotonic() - started_s
    found = json.loads(out_path.read_text(encoding="utf-8"))
    return RunFigures(
        total_s=total_s,
        first_epoch_s=found["epoch_s"][0],
        later_epochs_s=tuple(found["epoch_s"][1:]),
        num_steps=found["num_steps"],
        step_s=tuple(seconds / found["num_steps"] for seconds in found["epoch_s"]),
        begin_s=found["begin_s"],
        end_s=total_s - found["begin_s"] - sum(found["epoch_s"]),
        job_bytes={"one device": found["job_bytes"]},
        rss_bytes={"one device": found["rss_bytes"]},
    )


def main() -> None:
    """Train as the order says."""
    started_s = time.monotonic()
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from benchmarks.peers.peft_job import IGNORED_LABEL, LEARNING_RATE, model_of, peak_bytes, rows_of

    baseline_bytes = peak_bytes()
    tokenizer = AutoTokenizer.from_pretrained(order["model_dir"])
    model = model_of(order)

    at_s: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            at_s.append(time.monotonic())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            at_s.append(time.monotonic())

    rows = rows_of(order, tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=order["out_dir"],
            per_device_train_batch_size=order["batch_size"],
            num_train_epochs=order["epochs"],
            learning_rate=LEARNING_RATE,
            use_cpu=order["use_cpu"],
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL),
        callbacks=[Clock()],
    )
    trainer.train()
    model.save_pretrained(order["out_dir"])
    figures = {
        "begin_s": at_s[0] - started_s,
        "epoch_s": [after - before for before, after in itertools.pairwise(at_s)],
        "num_steps": -(-len(rows) // order["batch_size"]),
        "job_bytes": peak_bytes() - baseline_bytes,
        "rss_bytes": peak_bytes(),
    }
    Path(sys.argv[2]).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
