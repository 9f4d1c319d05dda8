"""Asks :mod:`coordinator.artifacts.verify` for its verdict, in a process of its own.

The verification needs torch, peft and perhaps the whole base model. In a process of its own it gives all of that back
when it ends, and an out-of-memory kill hits it and nothing else. Torch-free. Entry points:
:func:`run_verify_process`, and :class:`VerifyProcess` where it is known beforehand that there will be something.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from plutino.data.batches import MicroBatchRows
from plutino.errors import ExportError
from plutino.job.model import PLAIN, Packing
from plutino.job.objective import ObjectiveConfig
from plutino.job.objective_part import Counted

Check = tuple[str, str]
"""What was checked, and the outcome in words and numbers."""

MODULE = "coordinator.artifacts.verify"

_STDERR_TAIL_CHARS = 2000

_BY_ROW = ("lengths", "labels", "pair_ids", "second_starts", "reference_logps")
_BY_TOKEN = ("input_ids", "label_mask")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ProbeRows(_Value):
    """One micro-batch of the probe, without padding."""

    lengths: tuple[int, ...]
    """[num_rows], tokens of each row."""
    input_ids: tuple[int, ...]
    """[sum of lengths], rows one after the other."""
    label_mask: tuple[int, ...]
    """[sum of lengths], 1 where the token carries loss as a label."""
    padded_tokens: int
    """Rows are padded on the right to this many tokens."""

    labels: tuple[float, ...] = ()
    """[num_rows], class, number or rating; empty: the objective has none."""
    pair_ids: tuple[int, ...] = ()
    """[num_rows], the same number for both rows of a pair, the chosen one first; empty: no pairs."""
    second_starts: tuple[int, ...] = ()
    """[num_rows], tokens before the second of two texts; empty: nobody tells them apart."""
    reference_logps: tuple[float, ...] = ()
    """[num_rows], as the data set gave them; empty: it did not."""

    @property
    def first(self) -> ProbeRows:
        """The first row that has a label token, or the first one; of pairs the whole pair."""
        ends = list(itertools.accumulate(self.lengths))
        spans = [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        one = next((row for row, span in enumerate(spans) if any(self.label_mask[span])), 0)
        kept = [
            row
            for row in range(len(spans))
            if row == one or (self.pair_ids and self.pair_ids[row] == self.pair_ids[one])
        ]
        values: dict[str, tuple[float, ...]] = {
            name: tuple(getattr(self, name)[row] for row in kept) for name in _BY_ROW if getattr(self, name)
        }
        values |= {
            name: tuple(value for row in kept for value in getattr(self, name)[spans[row]]) for name in _BY_TOKEN
        }
        return self.model_copy(update=values)

    @classmethod
    def of(cls, rows: MicroBatchRows) -> ProbeRows:
        """The probe rows that are these rows."""
        return cls(
            lengths=tuple(rows.lengths.tolist()),
            input_ids=tuple(rows.input_ids.tolist()),
            label_mask=tuple(rows.label_mask.tolist()),
            padded_tokens=rows.padded_tokens,
            labels=() if rows.labels is None else tuple(rows.labels.tolist()),
            second_starts=() if rows.second_starts is None else tuple(rows.second_starts.tolist()),
            pair_ids=() if rows.pair_ids is None else tuple(rows.pair_ids.tolist()),
            reference_logps=() if rows.reference_logps is None else tuple(rows.reference_logps.tolist()),
        )


class Probe(_Value):
    """Rows whose loss the pipeline has measured with the parameters that are exported."""

    micro_batches: tuple[ProbeRows, ...]
    loss_sum: float
    """The pipeline's loss, summed over what is counted."""
    num_counted: float
    """Label tokens, rows that have some or their weights, or rows (a pair is one), that the pipeline counted."""
    objective: ObjectiveConfig | None = None
    """What the loss is; None: cross-entropy of the label tokens."""
    dtype: Literal["fp32", "bf16"]
    """The pipeline's compute dtype; the reload uses the same."""
    packing: Packing = PLAIN
    """How the pipeline held its frozen weights; the reload takes them as they are stored."""

    @property
    def counted(self) -> Counted:
        """What the loss is the mean over."""
        return "label tokens" if self.objective is None else self.objective.counted


class VerifyRequest(_Value):
    """What the verification looks at."""

    base_dir: str
    """Folder of the base model."""
    adapter_dir: str
    """Folder with adapter_model.safetensors and adapter_config.json."""
    probe: Probe | None
    """None: the adapter is not run."""
    reload_budget_bytes: int
    """Memory that a reloaded base, with the adapter, may take; 0 never reloads."""
    time_limit_s: int
    """The process ends itself after so many seconds, also if nobody waits for it any more."""


class VerifyReport(_Value):
    """The verdict."""

    checks: tuple[Check, ...] = ()
    was_reloaded: bool = False
    failure: str | None = None
    """Why the adapter must not be published; None if nothing speaks against it."""


class VerifyProcess:
    """A process for one verification, which may be started before there is anything to verify.

    Importing what it needs takes longer than most verifications: started ahead, it has that behind it, the base model's
    family included, and waits on its standard input. If whoever started it dies, that ends, and so does the process.
    Use it as a context manager.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> VerifyProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, base_dir: Path | None = None) -> None:
        """Start the process, if it was not started yet, for adapters of that base."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, *([] if base_dir is None else [str(base_dir)])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=module_environment(),
            )

    def __call__(self, request: VerifyRequest) -> VerifyReport:
        """Verify a staged adapter; the process is gone when this returns.

        Raises:
            ExportError: the adapter failed a check, or the process died, took too long or gave no verdict.
        """
        self.begin()
        process = self._process
        assert process is not None, "just begun"
        try:
            # The process bounds itself; the longer limit is for the case that it cannot any more.
            stdout, stderr = process.communicate(request.model_dump_json(), timeout=request.time_limit_s + 10)
        except subprocess.TimeoutExpired as error:
            raise ExportError(_too_long(request)) from error
        finally:
            self.close()
        if process.returncode == -signal.SIGALRM:
            raise ExportError(_too_long(request))
        return read_report(process.returncode, stdout, stderr)

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                # What was not sent to a process that has ended need not be sent.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait()


def run_verify_process(request: VerifyRequest) -> VerifyReport:
    """Verify a staged adapter in a process that is gone when this returns; see :class:`VerifyProcess`."""
    with VerifyProcess() as process:
        return process(request)


def read_report(exit_code: int, stdout: str, stderr: str) -> VerifyReport:
    """The report of an ended process.

    Args:
        exit_code: as :class:`subprocess.Popen` gives it, negative for a signal.
        stdout: JSON of a :class:`VerifyReport` if all went well.
        stderr: its end goes into the error.

    Raises:
        ExportError: the process failed, gave no report, or reports a failure.
    """
    tail = stderr.strip()[-_STDERR_TAIL_CHARS:] or "(it wrote nothing)"
    if exit_code == -signal.SIGKILL:
        raise ExportError(
            "the adapter's verification was killed (SIGKILL), most likely for memory; nothing was published: lower the "
            f"budget for reloading the base, or free memory. Its last output:\n{tail}"
        )
    if exit_code != 0:
        raise ExportError(
            f"the adapter's verification ended with exit code {exit_code}; nothing was published. "
            f"Its last output:\n{tail}"
        )
    try:
        report = VerifyReport.model_validate_json(stdout)
    except ValidationError as error:
        raise ExportError(
            f"the adapter's verification gave no report ({len(stdout)} characters that do not parse); nothing was "
            f"published. Its last output:\n{tail}"
        ) from error
    if report.failure is not None:
        raise ExportError(report.failure)
    return report


def module_environment() -> dict[str, str]:
    """This process's environment for one of our modules, with its import path and without a way to the network."""
    # The caller may stand in any folder, and an actor of Ray has its import path from elsewhere.
    package_root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": package_root if not inherited else os.pathsep.join((package_root, inherited)),
        # transformers and peft ask the hub for files that a local folder lacks.
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _too_long(request: VerifyRequest) -> str:
    return (
        f"the adapter's verification did not end within {request.time_limit_s} s; nothing was published: try again "
        "when the coordinator's machine is less busy, or do not reload the base (a budget of 0 bytes)"
    )
