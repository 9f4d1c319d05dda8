"""What a verification process's end means. No torch: the process itself is tested in tests/integration."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from coordinator.artifacts import verify_process
from coordinator.artifacts.verify_process import (
    Probe,
    ProbeRows,
    VerifyProcess,
    VerifyReport,
    VerifyRequest,
    read_report,
    run_verify_process,
)
from plutino.data.batches import MicroBatchRows
from plutino.errors import ExportError

REQUEST = VerifyRequest(base_dir="b", adapter_dir="a", probe=None, reload_budget_bytes=0, time_limit_s=20)


def test_report_of_a_clean_end_is_returned() -> None:
    report = VerifyReport(checks=(("stock peft", "32 tensors"),), was_reloaded=True)

    assert read_report(0, report.model_dump_json(), "some warning") == report


@pytest.mark.parametrize(
    ("exit_code", "stdout", "stderr", "message"),
    [
        (0, '{"failure": "w is missing; nothing was published"}', "", "^w is missing; nothing was published$"),
        (1, "", "x" * 5000 + "RuntimeError: odd", "exit code 1; nothing was published(.|\n)*RuntimeError: odd"),
        (-9, "", "", "killed .SIGKILL.(.|\n)*lower the budget(.|\n)*it wrote nothing"),
        (0, "no json", "hm", "7 characters that do not parse(.|\n)*hm"),
    ],
)
def test_report_of_a_bad_end_is_an_export_error(exit_code: int, stdout: str, stderr: str, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        read_report(exit_code, stdout, stderr)

    assert "nothing was" in str(caught.value)
    assert len(str(caught.value)) < 2500


def test_run_of_a_process_that_cannot_start_its_module_shows_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_process, "MODULE", "coordinator.artifacts.not_there")

    with pytest.raises(ExportError, match=r"exit code 1; nothing was published(.|\n)*No module named .*not_there"):
        run_verify_process(REQUEST)


def test_run_of_a_process_that_ended_itself_at_its_time_limit_tells_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nkill -ALRM $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    with pytest.raises(ExportError, match="did not end within 20 s; nothing was published"):
        run_verify_process(REQUEST)


def test_process_begun_ahead_answers_once_and_the_next_question_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in says its process id and its base as soon as it runs, and its process id again in its report."""
    report = '{"checks": [["process", "%s"]]}'
    (tmp_path / "python").write_text(
        f"#!/bin/sh\necho $$ $3 >> {tmp_path}/begun\ncat >/dev/null\nprintf '{report}' $$\n"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    with VerifyProcess() as process:
        process.begin(Path("base"))
        process.begin(Path("another"))
        answers = [process(REQUEST).checks[0][1] for _ in range(2)]

    assert (tmp_path / "begun").read_text().splitlines() == [f"{answers[0]} base", answers[1]]
    assert answers[0] != answers[1]


def test_process_begun_ahead_that_nobody_asks_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec cat\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    others = set(psutil.Process().children())
    process = VerifyProcess()
    process.begin()
    (child,) = set(psutil.Process().children()) - others

    process.close()

    assert not child.is_running()


def test_probe_rows_of_a_micro_batch_round_trip_as_json() -> None:
    rows = MicroBatchRows(
        lengths=np.array([2, 1], np.int32),
        input_ids=np.array([5, 6, 7], np.int32),
        label_mask=np.array([0, 1, 0], np.uint8),
        padded_tokens=2,
        sample_indices=(4, 9),
    )
    probe = Probe(micro_batches=(ProbeRows.of(rows),), loss_sum=1.5, num_counted=1, dtype="fp32")

    assert Probe.model_validate_json(probe.model_dump_json()) == probe
    assert probe.micro_batches[0].input_ids == (5, 6, 7)


PAIRS = ProbeRows(
    lengths=(2, 3, 1, 2),
    input_ids=(1, 2, 3, 4, 5, 6, 7, 8),
    label_mask=(0, 0, 0, 1, 1, 0, 0, 1),
    padded_tokens=3,
    labels=(0.5, 1.5, 2.5, 3.5),
)


def test_first_probe_row_is_the_first_with_a_label_token() -> None:
    first = PAIRS.first

    assert (first.lengths, first.input_ids, first.label_mask, first.labels) == ((3,), (3, 4, 5), (0, 1, 1), (1.5,))
    assert PAIRS.model_copy(update={"label_mask": (0,) * 8}).first.input_ids == (1, 2)


def test_first_probe_row_of_pairs_is_a_pair() -> None:
    first = PAIRS.model_copy(update={"pair_ids": (4, 6, 4, 6)}).first

    assert (first.lengths, first.input_ids, first.pair_ids) == ((3, 2), (3, 4, 5, 7, 8), (6, 6))
