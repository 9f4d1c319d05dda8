"""Configs and rows of every objective, for tests that walk the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from plutino.data.batches import MicroBatchRows
from plutino.job.objective import (
    ClassificationConfig,
    DaptConfig,
    DpoConfig,
    GrpoConfig,
    ObjectiveConfig,
    RegressionConfig,
    RewardConfig,
    SftConfig,
)
from plutino.job.objective_part import LENGTH_DISCOUNTS, Counted
from tests.numerics.pipelines import Batch, make_rows

CLASSES = ("a", "b", "c")

CONFIGS: dict[str, dict[str, ObjectiveConfig]] = {
    "classification": {"classes": ClassificationConfig(labels=CLASSES)},
    "dapt": {"packed": DaptConfig()},
    "dpo": {
        "sigmoid": DpoConfig(),
        "smoothed": DpoConfig(beta=0.3, label_smoothing=0.1),
        "ipo": DpoConfig(loss="ipo", average_logps=True),
        "hinge": DpoConfig(loss="hinge", beta=0.5),
        "given": DpoConfig(reference="rows"),
    },
    "grpo": {
        "sampled before": GrpoConfig(temperature=0.7, clip=0.05, beta=0.2),
        "sampled now": GrpoConfig(loss="dapo", clip_high=0.3, beta=0.0),
    },
    "regression": {"numbers": RegressionConfig()},
    "reward": {
        "pairs": RewardConfig(center_coefficient=0.05),
        "probabilities": RewardConfig(labels="ratings"),
        "numbers": RewardConfig(labels="ratings", rating_loss="mse"),
    },
    "sft": {"answers": SftConfig(), "rows": SftConfig(mean_over="rows"), "roots": SftConfig(mean_over="roots")},
}
"""By the registry's key: cases by name. A new objective gets its line here."""

CASES = [(objective, name) for objective, cases in CONFIGS.items() for name in cases]
ONE_EACH = [(objective, next(iter(cases))) for objective, cases in CONFIGS.items()] + [("sft", "rows")]
"""Cases for what is asked of every way of counting rather than of every formula."""


@dataclass(frozen=True)
class CountedBatch(Batch):
    counted: Counted

    @property
    def loss_weight(self) -> float:
        if discount := LENGTH_DISCOUNTS.get(self.counted):
            counts = [row.sum() for rows in self.rows for row in split_rows(rows, rows.label_mask)]
            return float(sum(count ** (1 - discount) for count in counts if count))
        if self.counted == "label tokens":
            return float(sum(rows.label_mask.sum() for rows in self.rows))
        return float(sum(len(rows.lengths) / (1 if rows.pair_ids is None else 2) for rows in self.rows))


def batches_for(config: ObjectiveConfig, num_steps: int = 3, num_micro_batches: int = 3) -> list[CountedBatch]:
    """A few steps; the last one has one micro-batch fewer, and that one fewer rows."""
    shapes = [[4] * num_micro_batches] * (num_steps - 1) + [[4] * (num_micro_batches - 2) + [2]]
    return [
        CountedBatch([rows_for(config, 10 * step + m, num_rows) for m, num_rows in enumerate(sizes)], config.counted)
        for step, sizes in enumerate(shapes)
    ]


def rows_for(config: ObjectiveConfig, seed: int, num_rows: int = 4) -> MicroBatchRows:
    """A micro-batch with what the objective asks of its rows."""
    generator = np.random.default_rng(1000 + seed)
    if config.type == "dapt":
        return packed(*(make_rows(10 * seed + row, 3) for row in range(num_rows)))
    rows = make_rows(seed, num_rows)
    if config.row_use == "pairs":
        logps = generator.uniform(-9, -3, num_rows).astype(np.float32)
        given = logps if config.type == "dpo" and not config.runs_reference else None
        # Both rows of a pair need not stand next to each other.
        ids = np.concatenate([np.arange(num_rows // 2)] * 2).astype(np.int32)
        return replace(rows, pair_ids=ids, reference_logps=given)
    if config.type == "grpo":
        num_labels = int(rows.label_mask.sum())
        logps = None if config.updates == 1 and config.temperature == 1 else generator.uniform(-6, -3, num_labels)
        return replace(
            rows,
            advantages=generator.normal(0, 1, num_rows).astype(np.float32),
            sampled_logps=None if logps is None else logps.astype(np.float32),
        )
    if config.type == "sft":
        return replace(rows, length_discount=LENGTH_DISCOUNTS.get(config.counted, 0.0))
    if config.type == "classification":
        return replace(rows, labels=generator.integers(0, len(CLASSES), num_rows).astype(np.float32))
    if config.row_use in ("label", "scored"):
        return replace(rows, labels=generator.uniform(0, 1, num_rows).astype(np.float32))
    return rows


def packed(*parts: MicroBatchRows) -> MicroBatchRows:
    """A row of each part, whose own rows become its segments; all but a segment's first token carry loss."""
    lengths = [int(part.lengths.sum()) for part in parts]
    masks = [np.arange(length) > 0 for part in parts for length in part.lengths]
    return MicroBatchRows(
        lengths=np.array(lengths, np.int32),
        input_ids=np.concatenate([part.input_ids for part in parts]),
        label_mask=np.concatenate(masks).astype(np.uint8),
        padded_tokens=max(lengths),
        sample_indices=tuple(range(len(parts))),
        segment_lengths=np.concatenate([part.lengths for part in parts]),
    )


def unpacked(rows: MicroBatchRows) -> MicroBatchRows:
    """The segments of packed rows as rows."""
    assert rows.segment_lengths is not None
    return replace(
        rows,
        lengths=rows.segment_lengths,
        padded_tokens=int(rows.segment_lengths.max()),
        sample_indices=tuple(range(len(rows.segment_lengths))),
        segment_lengths=None,
    )


def split_rows(rows: MicroBatchRows, values: Sequence[float] | np.ndarray) -> list[np.ndarray]:
    """Token-wise values of each row."""
    return np.split(np.asarray(values), np.cumsum(rows.lengths)[:-1])
