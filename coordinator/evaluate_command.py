"""``plutino evaluate``: answers rows or prompts, each with the adapter that it names, over one base model."""

from __future__ import annotations

import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coordinator.command_parts import AsJson, StateDir, local_client, print_json
from plutino.errors import ConfigError, JobError

if TYPE_CHECKING:
    from coordinator.sweeps.requests import NamedAdapter, Request
    from plutino.client import Client
    from plutino.sweep import SweepStatus

_LOOK_EVERY_S = 0.5


def evaluate(
    rows: Annotated[
        Path,
        typer.Argument(
            metavar="ROWS", help='Rows or prompts; the column "adapter" names one of --adapter, or none: the base.'
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=JOB|FOLDER", help="A finished job, or a PEFT folder. May be repeated."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER|HUB", help="The base model; else that of the adapters.")
    ] = None,
    metric: Annotated[
        Literal["exact_match", "json_slots", "perplexity"],
        typer.Option(
            help="How answers are compared with those of the rows; perplexity: how likely those of the rows are."
        ),
    ] = "exact_match",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 32,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As in a job file: placement.stages=2. May be repeated."),
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Answer rows with the adapter that each names. The base model is loaded once; rows are batched by adapter."""
    from coordinator.sweeps.requests import evaluation_of, read_requests, write_rows
    from plutino.endpoint import default_state_dir

    with local_client(state_dir) as client:
        adapters = {named.name: named for named in (_named(text, client) for text in adapter or [])}
        requests = read_requests(rows, adapters)
        folder = (state_dir or default_state_dir()).resolve() / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        rows_file = folder / f"{uuid.uuid4().hex}.jsonl"
        write_rows(requests, rows_file)
        try:
            spec = evaluation_of(
                requests,
                rows_file,
                adapters,
                model=model if model is None or not Path(model).is_dir() else str(Path(model).resolve()),
                metric=metric,
                max_new_tokens=max_new_tokens,
                overrides=settings or (),
            )
            sweep_id = client.sweeps.submit(spec)
            status = _until_ended(client, sweep_id)
            answered = answers(client, status, requests)
        finally:
            rows_file.unlink()
        _tell(status, answered, as_json=as_json)
    if status.state != "succeeded":
        raise JobError(f"evaluation {sweep_id} is {status.state}: {status.reason}")


def answers(client: Client, status: SweepStatus, requests: list[Request]) -> list[dict[str, Any]]:
    """What came of the requests, in the order in which they were handed in; those of failed adapters are left out."""
    from coordinator.sweeps.requests import PERPLEXITY

    found: list[tuple[int, dict[str, Any]]] = []
    for result in status.results:
        own = [request for request in requests if request.adapter == result.settings["adapter"]]
        if result.state != "succeeded" or result.job_id is None:
            continue
        if PERPLEXITY in result.values:
            continue  # nothing was generated
        samples = client.job(result.job_id).detail["scores"]["after"]["samples"]
        for request, sample in zip(own, samples, strict=True):
            row = {"adapter": request.adapter, "prompt": sample["prompt"], "answer": sample["answer"]}
            found.append((request.position, row | ({"expected": sample["truth"]} if request.has_truth else {})))
    return [row for _, row in sorted(found, key=lambda one: one[0])]


def _named(text: str, client: Client) -> NamedAdapter:
    """An adapter from the command line: a folder that is there, or a job."""
    from coordinator.sweeps.requests import ADAPTER_COLUMN, BASE, NamedAdapter

    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise ConfigError(f"{text!r} names no adapter; write --adapter NAME=JOB or --adapter NAME=FOLDER")
    if name == BASE:
        raise ConfigError(f"{BASE!r} is the base model alone (rows without {ADAPTER_COLUMN!r}); choose another name")
    if Path(place).is_dir():
        return NamedAdapter(name, Path(place).resolve())
    job = client.job(place)
    if job.summary.adapter_dir is None:
        raise ConfigError(
            f"job {job.summary.job_id} is {job.summary.state} and has published no adapter; wait for its end, or name "
            "a folder"
        )
    return NamedAdapter(name, Path(job.summary.adapter_dir), job.detail["spec"]["model"])


def _until_ended(client: Client, sweep_id: str) -> SweepStatus:
    try:
        while not (status := client.sweeps.status(sweep_id)).has_ended:
            time.sleep(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        client.sweeps.cancel(sweep_id)
        print(f"\nended {sweep_id}", file=sys.stderr)
        raise
    return status


def _tell(status: SweepStatus, answered: list[dict[str, Any]], *, as_json: bool) -> None:
    from coordinator.sweeps.requests import PERPLEXITY

    adapters = {
        result.settings["adapter"]: {
            "state": result.state,
            "reason": result.reason,
            "score": result.score if any("expected" in row for row in _of(answered, result.settings)) else None,
            "perplexity": result.values.get(PERPLEXITY),
            "num_rows": len(_of(answered, result.settings)) or result.num_scored,
            "job_id": result.job_id,
        }
        for result in status.results
    }
    if as_json:
        print_json({"adapters": adapters, "rows": answered})
        return
    from rich.table import Table

    from coordinator.screens import make_console

    console = make_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("adapter", "prompt", "answer", "expected"):
        table.add_column(heading)
    for row in answered:
        table.add_row(row["adapter"], row["prompt"], row["answer"], row.get("expected", ""))
    if answered:
        console.print(table)
    for name, one in adapters.items():
        score = "" if one["score"] is None else f", {one['score']:.1%} right"
        score += "" if one["perplexity"] is None else f", perplexity {one['perplexity']:.4g}"
        why = f": {one['reason']}" if one["reason"] else ""
        console.print(f"{name}: {one['state']}, {one['num_rows']} rows{score}{why}", markup=False, soft_wrap=True)


def _of(answered: list[dict[str, Any]], settings: dict[str, str]) -> list[dict[str, Any]]:
    return [row for row in answered if row["adapter"] == settings["adapter"]]
