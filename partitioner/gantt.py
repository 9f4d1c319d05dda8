"""Who computes, waits and sends, as text and as a picture; several traces of the same workers on one time scale."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from partitioner.trace import Span, Trace

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_MARKS = {"backward": "#", "sum": "+", "update": "u", "wait": ".", "ahead": "^"}
_COLOURS = {
    "forward": "#4c8eda",
    "backward": "#e08e45",
    "ahead": "#7fb0e6",
    "send down": "#9cc3ee",
    "send up": "#f0c9a0",
    "sum": "#7a5195",
    "wait": "#d9d9d9",
    "update": "#58a55c",
}
_ROW, _LANE, _LEFT, _TOP, _WIDTH = 34, 20, 150, 34, 1100
_KEY = "forward: the micro-batch; backward: #; sum over replicas: +; update: u; waiting: .; ahead of the next step: ^"

Names = Sequence[Sequence[str]]
"""[stage][replica] -> the device's name."""


def gantt_text(trace: Trace, names: Names, *, width: int = 100, until_s: float | None = None) -> str:
    """One line a worker; a forward pass shows its micro-batch, everything else its mark.

    Below them stands what the marks mean.

    Args:
        trace: what happened.
        names: [stage][replica] -> the device's name.
        width: columns for the whole step.
        until_s: seconds that the columns stand for; None: the trace's own.
    """
    step_s = until_s or trace.step_s or 1.0
    label = max(len(name) for of_stage in names for name in of_stage) + 5
    lines = []
    for k, of_stage in enumerate(names):
        for r, name in enumerate(of_stage):
            cells = ["."] * width
            for span in _computing(trace, k, r):
                first = min(width - 1, int(span.start_s / step_s * width))
                last = max(first + 1, int(span.end_s / step_s * width))
                mark = _MARKS.get(span.kind, _DIGITS[span.micro_batch % len(_DIGITS)])
                cells[first : min(last, width)] = [mark] * (min(last, width) - first)
            lines.append(f"{k}.{r} {name}".ljust(label) + "".join(cells))
    scale = f"0 s{'':{width - 12}}{step_s:.4g} s"
    return "\n".join([*lines, " " * label + scale, " " * label + _KEY]) + "\n"


def gantt_svg(trace: Trace, names: Names, *, title: str = "one optimiser step") -> str:
    """The same as an SVG picture, with messages under each worker's lane."""
    return gantts_svg([(title, trace)], names)


def gantts_svg(panels: Sequence[tuple[str, Trace]], names: Names) -> str:
    """Several traces of the same workers below each other, each with its title, on one time scale."""
    step_s = max((trace.step_s for _, trace in panels), default=0.0) or 1.0
    workers = [(k, r) for k, of_stage in enumerate(names) for r in range(len(of_stage))]
    panel_height = _TOP + _ROW * len(workers)
    height = panel_height * len(panels) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, trace) in enumerate(panels):
        parts += _panel(title, trace, names, workers, panel_height * number, step_s)
    foot = height - 14
    for tick in range(6):
        x = _LEFT + tick * _WIDTH / 5
        parts.append(f'<text x="{x:.0f}" y="{foot - 14}" text-anchor="middle">{tick * step_s / 5:.3g} s</text>')
    for place, (kind, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 120 * place
        parts.append(f'<rect x="{x}" y="{foot - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{foot + 1}">{kind}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    title: str, trace: Trace, names: Names, workers: Sequence[tuple[int, int]], above: int, step_s: float
) -> list[str]:
    parts = [f'<text x="8" y="{above + 20}" font-size="14">{escape(title)}</text>']
    for row, (k, r) in enumerate(workers):
        top = above + _TOP + row * _ROW
        parts.append(f'<text x="8" y="{top + 14}">{escape(f"stage {k}: {names[k][r]}")}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_LANE}" fill="#f2f2f2"/>')
        parts += [_bar(span, top, step_s) for span in trace.spans if (span.stage, span.replica) == (k, r)]
    return parts


def _bar(span: Span, top: int, step_s: float) -> str:
    x = _LEFT + span.start_s / step_s * _WIDTH
    width = max(0.5, (span.end_s - span.start_s) / step_s * _WIDTH)
    is_message = span.kind.startswith("send")
    y, height = (top + _LANE, 6) if is_message else (top, _LANE)
    what = span.kind if span.micro_batch < 0 else f"{span.kind} {span.micro_batch}"
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{_COLOURS[span.kind]}" '
        f'stroke="white" stroke-width="0.4"><title>{what}: {span.start_s:.4g} to {span.end_s:.4g} s</title></rect>'
    )


def _computing(trace: Trace, stage: int, replica: int) -> list[Span]:
    """What fills a worker's lane; waiting first, so that nothing hides behind it."""
    found = [
        span
        for span in trace.spans
        if (span.stage, span.replica) == (stage, replica) and not span.kind.startswith("send")
    ]
    return sorted(found, key=lambda span: (span.kind != "wait", span.start_s))
