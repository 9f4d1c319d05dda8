"""A loop as people see it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from plutino.llm2llm import LoopStatus, RoundStatus

_HEADINGS = ("round", "state", ">rows", ">seed right", ">held-out", ">asked", ">no answer", ">new rows", "rejected")


def loop_table(status: LoopStatus) -> RenderableType:
    """A loop's rounds, and where its adapter lies."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in _HEADINGS:
        is_number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if is_number else "left", no_wrap=is_number)
    for one in status.rounds:
        table.add_row(*(Text(cell) for cell in _cells(one)))
    parts: list[RenderableType] = [table]
    ended = [one for one in status.rounds if one.state == "done" and one.reason and not one.kept]
    parts += [Text(f"round {one.number}: {one.reason}") for one in ended]
    state = f"{status.loop_id}: {status.state}" + (f", {status.reason}" if status.reason else "")
    parts.append(Text(f"{state}; rows of all rounds: {status.data_dir}"))
    if status.adapter_dir is not None:
        parts.append(Text(f"adapter, verified: {status.adapter_dir}", style="bold"))
    return Group(*parts)


def round_lines(status: LoopStatus) -> list[str]:
    """A line for each round that is done, for a log."""
    lines = []
    for one in status.rounds:
        if one.state == "done":
            right = "" if one.seed_right is None else f", {one.seed_right} of {one.num_seed} seed rows right"
            held_out = "" if one.held_out is None else f", held-out {one.held_out:.1%}"
            rejected = "".join(f"; {count} rejected: {why}" for why, count in one.rejected.items())
            lines.append(
                f"round {one.number} on {one.num_rows} rows{right}{held_out}: {one.kept} new rows of {one.asked} "
                f"questions, {one.failed} without an answer{rejected}"
            )
    return lines


def _cells(one: RoundStatus) -> tuple[str, ...]:
    return (
        str(one.number),
        one.state,
        str(one.num_rows or ""),
        "" if one.seed_right is None else f"{one.seed_right} of {one.num_seed}",
        "" if one.held_out is None else f"{one.held_out:.1%}",
        str(one.asked or ""),
        str(one.failed or ""),
        str(one.kept or ""),
        ", ".join(f"{why} {count}" for why, count in one.rejected.items()),
    )
