"""What people see: tables, the live screen of a job, and the same as plain lines where stdout is not a terminal.

Entry points: :func:`plan_table`, :func:`device_table`, :func:`job_table`, :func:`job_panel`, :func:`summary` build
renderables from values; :func:`follow` shows a job until it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.job_view import JobView, WorkerView, counts_text, told
from coordinator.jobs.scoring import value_text
from partitioner.explain import later_epochs
from partitioner.plan import Plan, StagePlan
from plutino import events
from plutino.client import JobDetail, JobSummary, NumberedEvent
from plutino.members import TokenSummary
from plutino.sizes import MIB, format_size

_PLAIN_WIDTH = 160
"""Columns of a log file: wide enough that no table is cut."""
_PLAIN_STEP_EVERY_S = 2.0
"""A log gets one line of progress in so many seconds."""
_SCREENS_PER_S = 4
_STATE_STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "parked": "yellow",
    "recovering": "yellow",
    "running": "cyan",
}


def make_console() -> Console:
    """A console on stdout that cuts nothing where nobody looks at a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def plan_table(plan: Plan) -> RenderableType:
    """Which device runs which blocks, and what that is predicted to take; the reasons are partitioner.explain's."""
    shares = (">micro-batches",) if plan.has_replicas else ()
    names = ("stage", "device", "blocks", *shares, ">threads", ">forward ms", ">backward ms", ">peak MiB")
    table = _table(*names, ">budget MiB")
    for stage, owners in zip(plan.stages, plan.micro_batch_owners, strict=True):
        for index, replica in enumerate(stage.replicas):
            table.add_row(
                f"{stage.stage_index}.{index}" if stage.further_replicas else str(stage.stage_index),
                escape(replica.device_name),
                escape(_blocks(stage)),
                *((f"{owners.count(index)} of {plan.num_micro_batches}",) if plan.has_replicas else ()),
                str(replica.threads),
                f"{replica.forward_s * 1e3:.1f}",
                f"{replica.backward_s * 1e3:.1f}",
                _mib(replica.peak_bytes),
                _mib(replica.budget_bytes),
            )
    step = (
        f"predicted: {plan.step_s:.3g} s a step, bubble {plan.bubble_share:.0%}; {plan.num_micro_batches} x "
        f"{plan.micro_batch_rows} rows, {plan.dtype}, checkpointing {'on' if plan.checkpointing else 'off'}"
    )
    later = later_epochs(plan)
    return Group(table, Text(step), *([Text(later)] if later else []))


def device_table(devices: Iterable[Mapping[str, Any]]) -> RenderableType:
    """What every device gives, and what is taken of it."""
    table = _table(
        "device",
        "state",
        "hardware",
        ">threads",
        ">budget",
        ">baseline",
        ">reserved",
        ">agent",
        "dtypes",
        "torch",
        "links",
        "reason",
    )
    for device in devices:
        table.add_row(
            escape(device["name"]),
            device["state"],
            escape(_hardware(device["hardware"])),
            str(device["threads"]),
            format_size(device["memory_budget_bytes"]),
            format_size(device["baseline_bytes"]),
            format_size(device["reserved_bytes"]),
            format_size(device["agent_rss_bytes"]),
            ", ".join(device["dtypes"]),
            escape(device["versions"].get("torch", "")),
            escape(", ".join(_link(link) for link in device["links"])),
            escape(device["reason"]),
        )
    if not table.row_count:
        return Text("no devices; make a token for one with: plutino token create")
    return table


def link_table(devices: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The measured ways between devices, each pair once, and why others could not be measured."""
    rows = {tuple(row["agent_ids"]): row for device in devices for row in device.get("measured_links", [])}
    if not rows:
        return Text("no links are measured yet: it takes two idle devices, and less than a second a pair")
    table = _table("between", ">Mbit/s", ">ms", ">measured", "")
    for _, row in sorted(rows.items()):
        is_known = row["bandwidth_bytes_per_s"] is not None
        table.add_row(
            escape(" and ".join(row["between"])),
            f"{row['bandwidth_bytes_per_s'] * 8 / 1e6:.0f}" if is_known else "",
            f"{row['latency_s'] * 1e3:.2f}" if is_known else "",
            f"{_duration(row['age_s'])} ago",
            escape(row["error"] or ("one host: memory, no network" if row["is_same_host"] else "")),
        )
    return table


def _link(link: Mapping[str, Any]) -> str:
    """What a worker of the device is connected to."""
    return f"{link['job_id']} stage {link['stage']} {link['state']} {format_size(link['sent_bytes'])} sent"


def token_table(tokens: Sequence[TokenSummary], *, now_s: float) -> RenderableType:
    """All join tokens, oldest first."""
    if not tokens:
        return Text("no tokens; make one with: plutino token create")
    table = _table("token", "state", ">left", ">of", ">made", ">ends in")
    for token in tokens:
        left_s = token.expires_at_s - now_s
        table.add_row(
            token.token_id,
            token.state,
            str(token.uses_left),
            str(token.uses),
            f"{_duration(now_s - token.created_at_s)} ago",
            _duration(left_s) if token.state == "usable" else "",
        )
    return table


def _hardware(hardware: Mapping[str, Any]) -> str:
    """Where a device computes, and what it leaves idle."""
    parts = [hardware["kind"], hardware["name"], hardware["machine"], hardware["capability"]]
    if hardware["memory_bytes"]:
        parts.append(format_size(hardware["memory_bytes"]))
    idle = f" (idle: {', '.join(hardware['idle_accelerators'])})" if hardware["idle_accelerators"] else ""
    return " ".join(part for part in parts if part) + idle


def job_table(jobs: Sequence[JobSummary], *, now_s: float) -> RenderableType:
    """All jobs, oldest first."""
    if not jobs:
        return Text("no jobs; hand one in with: plutino submit job.yaml")
    table = _table("job", "state", ">step", ">age", "reason or adapter")
    for job in jobs:
        table.add_row(
            job.job_id,
            _styled_state(job.state),
            f"{job.step}/{job.total_steps or '?'}",
            _duration((job.ended_at_s or now_s) - job.submitted_at_s),
            escape(job.reason or job.adapter_dir or ""),
        )
    return table


def job_panel(view: JobView) -> RenderableType:
    """The live screen of a job."""
    head = Text.assemble((view.state, _STATE_STYLES.get(view.state, "")), f"  {view.reason}" if view.reason else "")
    parts: list[RenderableType] = [head]
    if view.total_steps:
        parts.append(_progress(view))
    if view.workers:
        parts.append(_worker_table(view))
    parts += [Text(worker.loading) for worker in view.workers.values() if worker.loading is not None]
    parts += [Text(told(score) or "") for score in view.scores.values()]
    if view.evaluations:
        steps = max(view.evaluations)
        parts.append(Text(f"evaluation loss after {steps} steps: {view.evaluations[steps]:.4f}"))
    parts += [Text(note, style="yellow") for note in view.notes]
    return Panel(Group(*parts), title=escape(view.job_id), title_align="left")


def summary(view: JobView) -> RenderableType:
    """What came of a job: losses, scores, answers before and after, and how to use the adapter."""
    parts: list[RenderableType] = []
    if view.losses:
        first, last = view.losses[min(view.losses)], view.losses[max(view.losses)]
        speed = f", {view.train_tokens / view.train_s:.0f} tokens/s" if view.train_s else ""
        parts.append(Text(f"{len(view.losses)} steps in {view.train_s:.1f} s{speed}; loss {first:.4f} -> {last:.4f}"))
    if view.scores:
        parts.append(_score_table(view))
    if "after" in view.scores and view.scores["after"].sample_rows:
        parts.append(_answer_table(view))
    if view.exported is not None:
        parts += [Text(f"{name}: {value}") for name, value in view.exported.measures]
        parts += [Text(f"verified, {check.name}: {check.result}") for check in view.exported.checks]
        parts.append(Text(f"published: {view.exported.adapter_dir} ({format_size(view.exported.bytes)})", style="bold"))
        parts += [Text(f"  {line}") for line in view.exported.loading_code.splitlines()]
    return Group(*parts)


def job_detail(job: JobDetail) -> RenderableType:
    """Everything that is stored of a job."""
    line, detail = job.summary, job.detail
    head = _styled_state(line.state).append(f"  {line.reason}" if line.reason else "", style="default")
    parts: list[RenderableType] = [Text(f"{line.job_id} ({line.name})", style="bold"), head]
    parts.append(Text(f"step {line.step} of {line.total_steps or '?'}, recoveries: {detail['recoveries']}"))
    if line.adapter_dir is not None:
        parts.append(Text(f"adapter: {line.adapter_dir}"))
    if detail["plan"] is not None:
        parts += ["", plan_table(Plan.model_validate(detail["plan"]))]
    standing = [row["loss"] for row in detail["ledger"] if row["status"] == "committed"]
    if standing:
        parts += ["", Text(f"loss: {standing[0]:.4f} -> {standing[-1]:.4f}, lowest {min(standing):.4f}")]
    parts += [Text(f"evaluation after {row['step']} steps: loss {row['loss']:.4f}") for row in detail["evaluations"]]
    parts += [Text(f"score {moment}: {_metrics(report)}") for moment, report in detail["scores"].items()]
    parts += [Text(f"{name}: {value}") for name, value in _ability(detail.get("ability") or {})]
    history = _table("at", "event", "state", ">plan epoch", "reason")
    for row in detail["transitions"]:
        states = row["to"] if row["from"] == row["to"] else f"{row['from']} -> {row['to']}"
        history.add_row(_clock(row["at_s"]), row["event"], states, str(row["plan_epoch"]), escape(row["reason"]))
    return Group(*parts, "", history)


def follow(view: JobView, numbered: Iterable[NumberedEvent], console: Console) -> None:
    """Show a job's events until they end; raises what the iterator raises."""
    if not console.is_terminal:
        for line in plain_lines(view, _with_plans(view, numbered, console)):
            console.print(line, markup=False, soft_wrap=True)
        return
    with Live(job_panel(view), console=console, refresh_per_second=_SCREENS_PER_S) as live:
        for one in _with_plans(view, numbered, console):
            view.take(one)
            live.update(job_panel(view))


def plain_lines(view: JobView, numbered: Iterable[NumberedEvent]) -> Iterator[str]:
    """The events as lines of a log, steps only now and then; every event is folded into ``view``."""
    last_step_at_s = -float("inf")
    for one in numbered:
        view.take(one)
        if isinstance(one.event, events.StepCommitted):
            is_last = view.step == view.total_steps
            if one.at_s - last_step_at_s < _PLAIN_STEP_EVERY_S and not is_last:
                continue
            last_step_at_s = one.at_s
            yield f"{_clock(one.at_s)} {_progress_line(view)}"
        elif (line := told(one.event)) is not None:
            yield f"{_clock(one.at_s)} {line}"


def _with_plans(view: JobView, numbered: Iterable[NumberedEvent], console: Console) -> Iterator[NumberedEvent]:
    """The same events; every new plan is printed once, above the live screen where there is one."""
    printed = view.plan
    for one in numbered:
        yield one
        if view.plan is not None and view.plan is not printed:
            printed = view.plan
            console.print(plan_table(printed))


def _progress(view: JobView) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=view.total_steps, completed=view.step, width=30), Text(_progress_line(view)))
    return grid


def _progress_line(view: JobView) -> str:
    parts = [f"step {view.step}/{view.total_steps}"]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.4f}")
    parts += counts_text(view.counts)
    if view.tokens_per_s is not None:
        parts.append(f"{view.tokens_per_s:.0f} tokens/s")
    if view.bubble_share is not None:
        parts.append(f"bubble {view.bubble_share:.0%}")
    if view.eta_s is not None and not view.has_ended:
        parts.append(f"{_duration(view.eta_s)} left")
    return "  ".join(parts)


def _worker_table(view: JobView) -> Table:
    table = _table("stage", "device", "blocks", ">threads", ">RSS MiB", ">peak", ">predicted", ">budget", ">busy")
    for worker in view.workers.values():
        table.add_row(
            worker.name,
            escape(worker.device_name),
            escape(_blocks(worker)),
            str(worker.threads),
            _mib(worker.rss_bytes) if worker.rss_bytes else "",
            _mib(worker.peak_rss_bytes) if worker.peak_rss_bytes else "",
            _mib(worker.predicted_peak_bytes),
            _mib(worker.budget_bytes),
            "" if worker.busy_share is None else f"{worker.busy_share:.0%}",
        )
    return table


def _score_table(view: JobView) -> Table:
    table = _table("score", ">base model", ">trained")
    before, after = view.metrics("before"), view.metrics("after")
    for name in after or before:
        table.add_row(name, *(value_text(name, values[name]) if name in values else "" for values in (before, after)))
    return table


def _answer_table(view: JobView) -> Table:
    table = _table("prompt", "expected", "base model", "trained")
    before = {row.prompt: row.answer for row in view.scores["before"].sample_rows} if "before" in view.scores else {}
    for row in view.scores["after"].sample_rows:
        style = "green" if row.is_right else "red"
        answers = (Text(_short(row.expected)), Text(_short(before.get(row.prompt, ""))))
        table.add_row(Text(_short(row.prompt)), *answers, Text(_short(row.answer), style=style))
    return table


def _table(*headings: str) -> Table:
    """A table; a heading that begins with > has its column to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        is_number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _ability(ability: Mapping[str, Any]) -> list[tuple[str, str]]:
    from coordinator.jobs.ability import AbilityReport, ability_lines

    known = {name: value for name, value in ability.items() if name in AbilityReport.model_fields}
    return ability_lines(AbilityReport.model_validate(known))


def _metrics(report: Mapping[str, Any]) -> str:
    tasks = {f"{task} ": one for task, one in report.get("by_task", {}).items()} or {"": report["score"]}
    values = {task + name: value for task, one in tasks.items() for name, value in one.items()}
    return ", ".join(f"{name} {value_text(name, value)}" for name, value in values.items() if isinstance(value, float))


def _blocks(stage: StagePlan | WorkerView) -> str:
    return f"[{stage.start_block}, {stage.end_block})"


def _styled_state(state: str) -> Text:
    return Text(state, style=_STATE_STYLES.get(state, ""))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}"


def _clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _short(text: str, num_characters: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= num_characters else line[: num_characters - 1] + "…"
