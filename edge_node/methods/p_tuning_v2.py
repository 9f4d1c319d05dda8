"""P-tuning v2 on one stage (Liu et al. 2021, arXiv:2110.07602): deep prompts, keys and values in every block.

The paper's prompts are a prefix without the MLP; what its authors add is dropout on keys and values. Each stage holds
those of its own blocks. P_TUNING in peft is the older method of that name, with embeddings before the first block
alone; the checkpoint is what stock peft writes for PREFIX_TUNING.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edge_node.methods.base import TrainableParameter
from edge_node.methods.dropout import SeededDropout
from edge_node.methods.key_values import AttachedKeyValues, saved_config, shape_in
from edge_node.methods.prefix import key_value_table
from edge_node.stage.stage import Stage
from plutino.job.method import PTuningV2Config
from plutino.key_value_layout import block_name


def attach_p_tuning_v2(stage: Stage, config: PTuningV2Config, *, seed: int) -> AttachedKeyValues:
    """Put deep prompts before the rows of a stage's blocks.

    Args:
        stage: a stage without an adapter.
        config: the method's config, the same for every stage.
        seed: the job's seed; initial values depend on it and on global names alone.
    """
    shape = shape_in(stage, config.num_virtual_tokens)
    encoders: dict[int, Callable[[], Tensor]] = {}
    parameters: list[TrainableParameter] = []
    for block in range(stage.start_block, stage.end_block):
        table = key_value_table(shape, block, seed, init=config.init, device=stage.device)
        dropout = SeededDropout(config.dropout, block_name(block))
        encoders[block] = lambda table=table, dropout=dropout: dropout(table)  # type: ignore[misc]
        parameters.append(TrainableParameter(block_name(block), (("block", table),), ("block",)))
    return AttachedKeyValues(stage, shape, encoders, parameters, saved_config(stage, shape, encoder_hidden_size=None))
