"""Tokenisation of large files as Ray tasks on this node. Entry point: :class:`RayTokenisation`.

Parts are handed out a few ahead and taken in the rows' order, so memory holds some parts however large the file is, and
the bytes are those of one process. Nothing waits for Ray: a part that no worker has finished when its turn comes is
made here.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from plutino.data.readers import Rows, rows_at
from plutino.data.tokenisation import PartTokens, Reading, tokenise_range
from plutino.data.tokenizer import ModelTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_ROWS_PER_TASK = 4096
_FEWEST_ROWS = 8 * _ROWS_PER_TASK
"""Below this a worker's start costs more than it saves."""
_ARRAYS = (
    *("input_ids", "label_mask", "lengths", "prompt_tokens", "line_numbers"),
    *("row_lines", "row_tokens", "labels", "reference_logps"),
)


def run_token_task(request_json: str, positions: bytes, line_numbers: bytes) -> list[dict[str, Any]]:
    """The task: rows by their positions to parts, as arrays and plain values, so that Ray pickles nothing of ours."""
    request = json.loads(request_json)
    rows = rows_at(
        Path(request["path"]),
        request["format"],
        request["columns"],
        np.frombuffer(positions, np.int64).tolist(),
        np.frombuffer(line_numbers, np.int64).tolist(),
    )
    reading = Reading(**{**request["reading"], "class_names": tuple(request["reading"]["class_names"])})
    parts = tokenise_range(rows, _tokenizer(request["model_dir"]), reading)
    return [{name: getattr(part, name) for name in (*_ARRAYS, "unlabelled", "bad_labels")} for part in parts]


@functools.lru_cache(maxsize=1)
def _tokenizer(model_dir: str) -> ModelTokenizer:
    """Kept between the tasks that one worker gets."""
    return load_tokenizer(Path(model_dir))


class RayTokenisation:
    """Implements :data:`plutino.data.tokenisation.Spread`; Ray must be connected in this process.

    Args:
        model_dir: folder of the base model's tokenizer.
        fewest_rows: smaller files are tokenised here.
    """

    def __init__(
        self, model_dir: Path, *, fewest_rows: int = _FEWEST_ROWS, rows_per_task: int = _ROWS_PER_TASK
    ) -> None:
        self._model_dir = model_dir
        self._fewest_rows = fewest_rows
        self._rows_per_task = rows_per_task
        self.num_done_by_ray = 0
        """Tasks whose parts were taken, rather than made here."""

    def __call__(self, rows: Rows, reading: Reading) -> Iterator[PartTokens] | None:
        """See :data:`plutino.data.tokenisation.Spread`."""
        places = rows.places()
        return None if places is None or len(rows) < self._fewest_rows else self._parts(rows, reading, *places)

    def _parts(self, rows: Rows, reading: Reading, positions: Any, line_numbers: Any) -> Iterator[PartTokens]:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        request = json.dumps(
            {
                "path": str(rows.path),
                "format": rows.format,
                "columns": dict(rows.columns),
                "model_dir": str(self._model_dir),
                "reading": {
                    "max_tokens": reading.max_tokens,
                    "train_on": reading.train_on,
                    "use": reading.use,
                    "class_names": reading.class_names,
                },
            }
        )
        # The file lies on this node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        task = ray.remote(run_token_task).options(num_cpus=1, max_retries=0, scheduling_strategy=here)
        ahead = max(2, int(ray.cluster_resources().get("CPU", 1.0)) + 1)  # type: ignore[no-untyped-call]
        starts = deque(range(0, len(rows), self._rows_per_task))
        out: deque[tuple[int, Any]] = deque()
        tokenizer = _tokenizer(str(self._model_dir))
        while starts or out:
            while starts and len(out) < ahead:
                start = starts.popleft()
                end = min(start + self._rows_per_task, len(rows))
                out.append((start, task.remote(request, _bytes(positions[start:end]), _bytes(line_numbers[start:end]))))
            start, handed_out = out.popleft()
            try:
                finished, _ = ray.wait([handed_out], timeout=0)
                found = ray.get(handed_out) if finished else None
            except RayError as error:
                logger.warning("rows from %d on are tokenised here, not on Ray: %s", start, error)
                found = None
            if found is not None:
                self.num_done_by_ray += 1
                yield from (PartTokens(**part) for part in found)
                continue
            ray.cancel(handed_out)
            yield from tokenise_range(rows, tokenizer, reading, start, min(start + self._rows_per_task, len(rows)))


def _bytes(numbers: Any) -> bytes:
    return np.array(numbers, np.int64).tobytes()
