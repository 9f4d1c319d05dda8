"""A preview of rows as people see it: tokens that carry loss in colour, lengths as bars, problems with their lines."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from plutino.data.preview import Lengths, Lines, RowsPreview, ShownSequence

_LOSS_STYLE = "bold green"
_CUT_STYLE = "dim strike"
_BAR_WIDTH = 40
_TOKENS_SHOWN = 400


def preview_view(preview: RowsPreview, *, name: str = "", has_colours: bool = True) -> RenderableType:
    """One file of rows.

    Args:
        preview: what was found.
        name: what the job uses the file for; empty outside of a job.
        has_colours: False puts marks around what carries loss.
    """
    parts: list[RenderableType] = [
        Text.assemble((preview.path, "bold"), f" ({name})" if name else "", f": {_facts(preview)}"),
    ]
    for title, problems, style in (
        ("cannot be read", preview.unreadable, "red"),
        ("cannot be used", preview.unusable, "red"),
    ):
        parts += [Text(f"  {title}, {_named(p.lines)}: {p.text}", style=style) for p in problems]
    cut = "go on in further samples" if preview.use == "text" else "are cut"
    notes = ((f"longer than {preview.max_tokens} tokens, {cut}", preview.truncated), ("dropped", preview.dropped))
    parts += [Text(f"  {title}: {_named(lines)}", style="yellow") for title, lines in notes if lines.num_rows]
    if preview.duplicates.num_rows:
        pairs = ", ".join(f"{line} (as {first})" for line, first in list(preview.duplicate_of.items())[:5])
        num_more = preview.duplicates.num_rows - min(5, len(preview.duplicate_of))
        more = f" and {num_more} more" if num_more else ""
        parts.append(
            Text(
                f"  duplicates: {_rows(preview.duplicates)}, line{_plural(preview.duplicates)} {pairs}{more}",
                style="yellow",
            )
        )
    if preview.classes:
        parts.append(Text("  classes: " + ", ".join(f"{name} {count}" for name, count in preview.classes.items())))
    if preview.lengths is not None:
        parts.append(_histogram(preview.lengths))
    parts += [_sequence(sequence, has_colours=has_colours) for sequence in preview.shown]
    return Group(*parts)


def legend(*, has_colours: bool) -> RenderableType:
    """What the colours, or the marks in place of them, mean."""
    if not has_colours:
        return Text("«carries loss» read only")
    return Text.assemble(("carries loss", _LOSS_STYLE), "  read only  ", ("cut off", _CUT_STYLE))


def _facts(preview: RowsPreview) -> str:
    share = preview.num_label_tokens / preview.num_tokens if preview.num_tokens else 0.0
    loss = f", {preview.num_label_tokens} of them ({share:.1%}) carry loss" if preview.num_label_tokens else ""
    samples = f" in {preview.num_samples} samples" if preview.num_samples != preview.num_rows else ""
    return (
        f"{preview.num_rows} rows{samples}, format {preview.format}, taken as {preview.use}; "
        f"{preview.num_tokens} tokens{loss}"
    )


def _histogram(lengths: Lengths) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 2))
    most = max(bar.num_rows for bar in lengths.histogram)
    for bar in lengths.histogram:
        is_one = bar.from_tokens == bar.to_tokens
        span = str(bar.from_tokens) if is_one else f"{bar.from_tokens}-{bar.to_tokens}"
        blocks = "█" * -(-bar.num_rows * _BAR_WIDTH // most)
        table.add_row(Text(span, justify="right"), Text(f"{blocks} {bar.num_rows}".strip()))
    return Group(
        Text(
            f"  tokens: {lengths.shortest} to {lengths.longest}, median {lengths.median}, 90 % up to {lengths.p90}, "
            f"99 % up to {lengths.p99}, mean {lengths.mean:.1f}"
        ),
        table,
    )


def _sequence(sequence: ShownSequence, *, has_colours: bool) -> RenderableType:
    text = Text(f"  line {sequence.line_number}: ")
    carried = False
    for token in sequence.tokens[:_TOKENS_SHOWN]:
        if not has_colours and token.carries_loss != carried:
            text.append("«" if token.carries_loss else "»")
        carried = token.carries_loss
        text.append(token.text, _CUT_STYLE if token.is_cut else _LOSS_STYLE if carried else "")
    if not has_colours and carried:
        text.append("»")
    if (num_left := len(sequence.tokens) - _TOKENS_SHOWN) > 0:
        text.append(f" ... and {num_left} more tokens", "dim")
    if sequence.label:
        text.append(f" -> {sequence.label}", "bold cyan")
    return text


def _rows(lines: Lines) -> str:
    return f"{lines.num_rows} row{_plural(lines)}"


def _plural(lines: Lines) -> str:
    return "" if lines.num_rows == 1 else "s"


def _named(lines: Lines) -> str:
    named = ", ".join(str(line) for line in lines.first)
    more = f" and {lines.num_rows - len(lines.first)} more" if lines.num_rows > len(lines.first) else ""
    return f"{_rows(lines)}, line{_plural(lines)} {named}{more}"
