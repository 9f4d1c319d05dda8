"""Who computes, waits and sends, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from partitioner.trace import Span, Trace

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_COLOURS = {
    "forward": "#4c8eda",
    "backward": "#e08e45",
    "send down": "#9cc3ee",
    "send up": "#f0c9a0",
    "sum": "#7a5195",
}
_ROW, _LANE, _LEFT, _TOP, _WIDTH = 34, 20, 150, 34, 1100


def gantt_text(trace: Trace, names: Sequence[Sequence[str]], *, width: int = 100) -> str:
    """One line a worker; a forward pass shows its micro-batch, a backward pass ``#`` , waiting ``.``, a sum ``+``.

    Args:
        trace: what happened.
        names: [stage][replica] -> the device's name.
        width: columns for the whole step.
    """
    step_s = trace.step_s or 1.0
    label = max(len(name) for of_stage in names for name in of_stage) + 5
    lines = []
    for k, of_stage in enumerate(names):
        for r, name in enumerate(of_stage):
            cells = ["."] * width
            for span in _computing(trace, k, r):
                first = min(width - 1, int(span.start_s / step_s * width))
                last = max(first + 1, int(span.end_s / step_s * width))
                mark = {"backward": "#", "sum": "+"}.get(span.kind, _DIGITS[span.micro_batch % len(_DIGITS)])
                cells[first : min(last, width)] = [mark] * (min(last, width) - first)
            lines.append(f"{k}.{r} {name}".ljust(label) + "".join(cells))
    scale = f"0 s{'':{width - 12}}{step_s:.4g} s"
    key = "forward: the micro-batch; backward: #; sum over replicas: +; waiting: ."
    return "\n".join([*lines, " " * label + scale, " " * label + key]) + "\n"


def gantt_svg(trace: Trace, names: Sequence[Sequence[str]], *, title: str = "one optimiser step") -> str:
    """The same as an SVG picture, with messages under each worker's lane."""
    step_s = trace.step_s or 1.0
    workers = [(k, r) for k, of_stage in enumerate(names) for r in range(len(of_stage))]
    height = _TOP + _ROW * len(workers) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="20" font-size="14">{escape(title)}</text>',
    ]
    for row, (k, r) in enumerate(workers):
        top = _TOP + row * _ROW
        parts.append(f'<text x="8" y="{top + 14}">{escape(f"stage {k}: {names[k][r]}")}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_LANE}" fill="#f2f2f2"/>')
        for span in trace.spans:
            if (span.stage, span.replica) == (k, r):
                parts.append(_bar(span, top, step_s))
    foot = height - 14
    for tick in range(6):
        x = _LEFT + tick * _WIDTH / 5
        parts.append(f'<text x="{x:.0f}" y="{foot - 14}" text-anchor="middle">{tick * step_s / 5:.3g} s</text>')
    for place, (kind, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 130 * place
        parts.append(f'<rect x="{x}" y="{foot - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{foot + 1}">{kind}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


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
    return [
        span
        for span in trace.spans
        if (span.stage, span.replica) == (stage, replica) and not span.kind.startswith("send")
    ]
