"""What a doctor found: one line a finding, with the measured value and, where something is wrong, the way out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum


class Verdict(str, Enum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    """It works, but slower, smaller or less safely than it could."""
    FAIL = "fail"
    """plutino does not work here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a report."""

    name: str
    verdict: Verdict
    measured: str
    """The value, with its unit, and why it is judged so."""
    fix: str = ""
    """A command, or what to do where no command does it; only of warnings and failures."""


def ok(name: str, measured: str) -> Finding:
    """A finding that needs nothing."""
    return Finding(name=name, verdict=Verdict.OK, measured=measured)


def warn(name: str, measured: str, fix: str) -> Finding:
    """A finding that costs something."""
    return Finding(name=name, verdict=Verdict.WARN, measured=measured, fix=fix)


def fail(name: str, measured: str, fix: str) -> Finding:
    """A finding that stops plutino."""
    return Finding(name=name, verdict=Verdict.FAIL, measured=measured, fix=fix)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything failed."""
    return 1 if any(finding.verdict is Verdict.FAIL for finding in findings) else 0


def as_text(findings: Sequence[Finding]) -> str:
    """The report for a person."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict.value:<4}  {finding.name:<{width}}  {finding.measured}")
        if finding.fix:
            lines.append(f"{'':<4}  {'':<{width}}  fix: {finding.fix}")
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    lines.append(", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The report for a program: one document on one line."""
    values = [{**asdict(finding), "verdict": finding.verdict.value} for finding in findings]
    return json.dumps({"findings": values, "exit_code": exit_code(findings)}, ensure_ascii=False)
