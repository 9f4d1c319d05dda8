"""Weights to the devices: the whole path of a worker's loading against raw TCP, on loopback and on a 1 Gbit link.

On loopback, in turns: raw TCP; raw TCP that also hashes and writes, as every device must; the bulk process's stream; a
worker's whole loading (manifest, streams, sha256, cache on disk, tensors in memory). On the link: three loaders pull a
third each of a model of TinyLlama-1.1B's size through a token bucket, against what the link allows. The link is the
loopback of a network namespace of its own, so it carries no TLS; it needs root, and says so where there is none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from benchmarks.goals import Goal, goal_table
from benchmarks.measure import MIN_TURNS, RESULTS_DIR, machine_facts
from benchmarks.raw_tcp import receive, receive_hashed
from coordinator.weights.model_files import offer_model
from edge_node.cache import BlobCache
from edge_node.sources.coordinator import CoordinatorSource
from edge_node.sources.shared import SharedWeights
from plutino.manifest import Manifest
from plutino.wire.bulk import BulkClient

MIB = 1 << 20
TINY_LLAMA_BYTES = 2_200_119_296
"""TinyLlama-1.1B in bf16: 1 100 048 384 parameters, plus its header."""
LINK_BITS_PER_S = 10**9
NUM_LOADERS = 3
_JOB = "bench"
_START_S = 30.0


def write_model(folder: Path, total_bytes: int, *, tensor_bytes: int = 16 * MIB) -> None:
    """A model folder of random tensors: what is in them does not matter to who carries them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    generator = np.random.default_rng(0)
    count = max(NUM_LOADERS, total_bytes // tensor_bytes)
    tensors = {
        f"model.layers.{number}.weight": generator.integers(0, 2**16, total_bytes // count // 2, np.uint16).view(
            np.float16
        )
        for number in range(count)
    }
    save_file(tensors, folder / "model.safetensors")


@contextmanager
def _child(*command: str) -> Iterator[dict[str, Any]]:
    """A server as a child process; gives the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {process.wait(_START_S)} before it served")
        yield json.loads(line)
    finally:
        process.kill()
        process.wait(_START_S)


@contextmanager
def _bulk(state_dir: Path) -> Iterator[str]:
    options = ["--state-dir", str(state_dir), "--parent-pid", str(os.getpid())]
    with _child("-m", "coordinator.weights.bulk", *options) as said:
        yield said["address"]


def load(address: str, manifest_sha256: str, cache_dir: Path, *, part: int = 0, num_parts: int = 1) -> int:
    """What a worker does to load its share of the tensors; returns their bytes."""
    with BulkClient(address) as bulk:
        manifest = Manifest.from_bytes(bulk.manifest(_JOB, manifest_sha256))
        names = sorted(manifest.tensors, key=lambda name: manifest.tensors[name].start)
        own = names[len(names) * part // num_parts : len(names) * (part + 1) // num_parts]
        weights = SharedWeights(manifest, cache=BlobCache(cache_dir), sources=[CoordinatorSource(bulk, _JOB)])
        try:
            weights.prepare(own)
            for name in own:
                weights.read(name, torch.float16)
            return weights.bytes_read
        finally:
            weights.close()


def on_loopback(folder: Path, total_bytes: int, num_turns: int) -> dict[str, list[float]]:
    """Bytes per second of each way, by turn."""
    write_model(folder / "model", total_bytes)
    file = folder / "model" / "model.safetensors"
    size = file.stat().st_size
    manifest_sha256 = hashlib.sha256(offer_model(folder / "jobs" / _JOB, folder / "model").to_bytes()).hexdigest()
    target = memoryview(bytearray(size))
    with _child("-m", "benchmarks.raw_tcp", str(file)) as raw, _bulk(folder) as address, BulkClient(address) as bulk:

        def stream() -> None:
            at = 0
            for piece in bulk.stream_range(_JOB, file.name, 0, size):
                target[at : at + len(piece)] = piece
                at += len(piece)

        def whole() -> None:
            load(address, manifest_sha256, folder / "cache")

        ways: dict[str, Callable[[], object]] = {
            "raw TCP": lambda: receive(raw["port"], target),
            "raw TCP, hashed and written": lambda: receive_hashed(raw["port"], size, folder / "received"),
            "bulk stream": stream,
            "whole loading": whole,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(num_turns + 1):
            names = list(ways) if turn % 2 == 0 else list(reversed(ways))
            for name in names:
                shutil.rmtree(folder / "cache", ignore_errors=True)
                started_s = time.perf_counter()
                ways[name]()
                if turn:  # the first warms up
                    rates[name].append(size / (time.perf_counter() - started_s))
            print(f"turn {turn} of {num_turns}", flush=True)
    return rates


def on_link(folder: Path, total_bytes: int) -> dict[str, float] | str:
    """Seconds that three loaders took, and that the link allows; or why there is no link to measure on."""
    if os.geteuid() != 0:
        return "a shaped link needs root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "a shaped link needs ip and tc (iproute2)"
    space = f"plutino-{secrets.token_hex(3)}"
    try:
        _sh("ip", "netns", "add", space)
    except subprocess.CalledProcessError as error:
        return f"no network namespace: {error.stderr.strip()}"
    try:
        _sh("ip", "-n", space, "link", "set", "lo", "up")
        rate = f"{LINK_BITS_PER_S}bit"
        _sh(
            "tc",
            "-n",
            space,
            "qdisc",
            "add",
            "dev",
            "lo",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "256k",
            "latency",
            "50ms",
        )
        write_model(folder / "model", total_bytes)
        inside = [sys.executable, "-m", "benchmarks.weights", "--inside", str(folder)]
        ended = subprocess.run(["ip", "netns", "exec", space, *inside], check=True, capture_output=True, text=True)
        figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
        return figures
    except subprocess.CalledProcessError as error:
        return f"{' '.join(map(str, error.cmd[:6]))} failed: {error.stderr.strip()[-400:]}"
    finally:
        _sh("ip", "netns", "del", space)


def _inside(folder: Path) -> None:
    """In the namespace: the bulk process and three loaders, all over its loopback."""
    manifest = offer_model(folder / "jobs" / _JOB, folder / "model").to_bytes()
    with _bulk(folder) as address:
        # Imports are done before the clock starts, as in a spare worker.
        digest = hashlib.sha256(manifest).hexdigest()
        command = [sys.executable, "-m", "benchmarks.weights", "--loader"]
        loaders = [
            subprocess.Popen(
                [*command, str(number), address, digest, str(folder / f"cache{number}")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(NUM_LOADERS)
        ]
        for loader in loaders:
            assert loader.stdout is not None and loader.stdout.readline() == "ready\n"
        started_s = time.perf_counter()
        for loader in loaders:
            assert loader.stdin is not None
            loader.stdin.write("go\n")
            loader.stdin.flush()
        # Not their ends: those take seconds that are torch's.
        loaded_bytes = sum(int(loader.stdout.readline()) for loader in loaders if loader.stdout is not None)
        seconds = time.perf_counter() - started_s
        for loader in loaders:
            loader.communicate(timeout=_START_S)
    allowed_s = loaded_bytes * 8 / LINK_BITS_PER_S
    file = folder / "model" / "model.safetensors"
    target = memoryview(bytearray(file.stat().st_size))
    with _child("-m", "benchmarks.raw_tcp", str(file)) as raw:
        started_s = time.perf_counter()
        receive(raw["port"], target)
        raw_s = (time.perf_counter() - started_s) * loaded_bytes / len(target)
    print(json.dumps({"seconds": seconds, "allowed_s": allowed_s, "raw_tcp_s": raw_s, "bytes": loaded_bytes}))


def _loader(number: str, address: str, manifest_sha256: str, cache_dir: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    print(load(address, manifest_sha256, Path(cache_dir), part=int(number), num_parts=NUM_LOADERS), flush=True)


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_START_S)


def _report(rates: Mapping[str, Sequence[float]], link: Mapping[str, float] | str) -> tuple[list[Goal], dict[str, Any]]:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    a_a = {name: statistics.median(v[0::2]) / statistics.median(v[1::2]) for name, v in rates.items()}
    for name, median in medians.items():
        print(
            f"{name:<28} {median / 1e6:>8.0f} MB/s   {median / medians['raw TCP']:.2f} of raw TCP   A/A {a_a[name]:.2f}"
        )
    goals = [
        Goal(name=f"{name} / raw TCP", measured=medians[name] / medians["raw TCP"], at_least=0.8)
        for name in ("bulk stream", "whole loading")
    ]
    hashed = medians["raw TCP, hashed and written"]
    goals.append(Goal(name="whole loading / raw TCP, hashed and written", measured=medians["whole loading"] / hashed))
    if isinstance(link, str):
        print(f"1 Gbit link: not measured, {link}")
    else:
        print(
            f"1 Gbit link: {link['bytes'] / 1e9:.2f} GB in {link['seconds']:.1f} s; the link allows "
            f"{link['allowed_s']:.1f} s, one raw TCP stream takes {link['raw_tcp_s']:.1f} s"
        )
        goals.append(
            Goal(name="1 Gbit: seconds / allowed seconds", measured=link["seconds"] / link["allowed_s"], at_most=1.1)
        )
    return goals, {"bytes_per_s": {name: list(values) for name, values in rates.items()}, "a_a": a_a, "link": link}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write benchmarks/results/weights.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__)
    parser.add_argument("--turns", type=int, default=MIN_TURNS)
    parser.add_argument("--mib", type=int, default=512, help="size of the model on loopback")
    parser.add_argument("--link-bytes", type=int, default=TINY_LLAMA_BYTES, help="size of the model on the link")
    parser.add_argument("--folder", type=Path, default=None, help="where models and caches are written")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "weights.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--loader", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside is not None:
        _inside(options.inside)
        return 0
    if options.loader is not None:
        _loader(*options.loader)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rates = on_loopback(Path(folder) / "loopback", options.mib * MIB, options.turns)
        shutil.rmtree(Path(folder) / "loopback")
        link = on_link(Path(folder) / "link", options.link_bytes)
    goals, figures = _report(rates, link)
    bounded = [goal for goal in goals if goal.at_least is not None or goal.at_most is not None]
    print(goal_table(bounded))
    document = {
        "machine": machine_facts(("torch", "grpcio")),
        "model_mib": options.mib,
        **figures,
        "goals": [goal.to_dict() for goal in goals],
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
