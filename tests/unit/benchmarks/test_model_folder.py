from __future__ import annotations

import numpy as np
import pytest

from benchmarks.model_folder import job_values, write_base
from benchmarks.peers.workload import Workload, batch
from plutino.data.batches import batch_indices, cut_micro_batches
from plutino.data.readers import read_rows
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import load_tokenizer
from plutino.job.spec import parse_spec

WORKLOAD = Workload(
    num_blocks=2,
    hidden_dim=16,
    intermediate_dim=32,
    num_heads=2,
    vocab_size=64,
    seq_len_tokens=12,
    batch_size=4,
    num_micro_batches=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(WORKLOAD, tmp_path_factory.mktemp("model"), num_steps=5, dtype="fp32")


def test_write_rows_every_step_of_the_job_trains_on_the_peers_tokens(folder):
    tokenizer = load_tokenizer(folder.model_dir)
    samples = tokenise(read_rows(folder.rows_path), tokenizer, max_tokens=WORKLOAD.seq_len_tokens, train_on="all")

    for step in range(5):
        indices = batch_indices(step, WORKLOAD.batch_size, len(samples), WORKLOAD.seed)
        fed = np.stack([samples.ids(index) for index in indices])
        np.testing.assert_array_equal(fed, batch(WORKLOAD, step).numpy())


def test_write_rows_loss_weight_is_that_of_shifted_labels(folder):
    tokenizer = load_tokenizer(folder.model_dir)
    samples = tokenise(read_rows(folder.rows_path), tokenizer, max_tokens=WORKLOAD.seq_len_tokens, train_on="all")

    cut = cut_micro_batches(samples, batch_indices(0, 4, len(samples), 0), micro_batch_size=2)

    assert cut.loss_weight == WORKLOAD.batch_size * (WORKLOAD.seq_len_tokens - 1)


def test_job_values_are_a_job_spec_with_the_peers_micro_batches(folder, tmp_path):
    values = job_values(WORKLOAD, folder, dtype="fp32", shadow_every=3, num_stages=2)

    training = parse_spec(values, base_dir=tmp_path).training

    assert (training.steps, training.micro_batch_size, training.max_grad_norm) == (5, 2, None)
