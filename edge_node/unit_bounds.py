"""What a worker's job lets come over the wire: which rows it reads, and how large they and its tensors may be."""

from __future__ import annotations

from edge_node.transport.base import Peer
from plutino.data.batches import MicroBatchRows
from plutino.job.assignment import WorkerAssignment
from plutino.types import UnitKind
from plutino.wire.convert import micro_batch_from_proto
from plutino.wire.messages import Bounds
from protos import workers_pb2 as pb

_METADATA_BYTES = 1 << 20


class UnitBounds:
    """Bounds of one worker, from its job's settings."""

    def __init__(self, assignment: WorkerAssignment, me: Peer) -> None:
        self._assignment = assignment
        self._me = me
        self.vocab_size = 2**31 - 1
        """Of the model, once it is known."""
        spec = assignment.spec
        self.max_rows = max(spec.rows_per_step, spec.generated_rows)
        self.max_tokens = spec.data.max_tokens + spec.generated_tokens

    def of_messages(self, boundary_width: int, largest_gradient_bytes: int) -> Bounds:
        """Of what peers send: hidden states with their metadata, or gradients that several workers add up."""
        num_tokens = self.max_tokens + self._assignment.spec.method.prompt_tokens
        hidden_bytes = 4 * boundary_width * self.max_rows * num_tokens
        largest_bytes = max(hidden_bytes, largest_gradient_bytes) + _METADATA_BYTES
        return Bounds(max_message_bytes=largest_bytes, max_inbox_bytes=4 * largest_bytes)

    def reads_rows(self, kind: UnitKind, micro_batch: int) -> bool:
        """Whether this worker needs a micro-batch's rows; for generation they carry the options."""
        assignment = self._assignment
        if kind == UnitKind.GENERATE:
            return self._me.replica_index == 0
        is_mine = assignment.shape.replica_of(micro_batch) == self._me.replica_index
        return is_mine and (assignment.is_first or assignment.is_last)

    def decode_rows(self, feed: pb.Feed) -> MicroBatchRows:
        """A micro-batch's rows, checked."""
        return micro_batch_from_proto(
            feed.rows,
            max_rows=self.max_rows,
            max_tokens=self.max_tokens,
            vocab_size=self.vocab_size,
            sample_indices=feed.generate.sample_indices,
        )
