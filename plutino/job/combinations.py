"""Which settings of different parts of a job spec go together.

What one part says of itself it checks itself; here stands what only the whole spec shows. Every problem names the
settings and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

from plutino.families import EMBEDDING_NAMES
from plutino.job.objective_part import GENERATED_METRICS
from plutino.job.parts import JobParts


def combination_problems(spec: JobParts) -> Iterator[str]:
    """What does not go together, the most fundamental first."""
    is_open = spec.auto_method is not None and spec.auto_method.is_open
    if not is_open:
        yield from _method_problems(spec)
    yield from _training_problems(spec)
    if not is_open:
        # Each method that could be taken is looked at beside the other settings before one is.
        yield from _activation_cache_problems(spec)
    yield from _held_out_problems(spec)
    yield from _scoring_problems(spec)
    yield from _packing_problems(spec)
    yield from _codec_problems(spec)
    yield from _metric_problems(spec)


def _method_problems(spec: JobParts) -> Iterator[str]:
    method, model, objective = spec.method, spec.model, spec.objective
    if method.unpacks_weights and model.quantization != "none":
        yield (
            f"method.{method.unpacks_weights} takes the norm of every frozen weight, which model.quantization: "
            f"{model.quantization} would have to unpack whole in each pass; set one of the two off"
        )
    if objective.has_score_head and not method.saves_score_head:
        yield (
            f"objective.type: {objective.type} trains a score head, which a checkpoint of method.type: {method.type} "
            "has no place for; set method.type: lora, adapters, full or p_tuning_v2"
        )
    if spec.training.init_adapter is not None and method.no_continuation:
        yield f"training.init_adapter: {method.no_continuation}"
    if not method.trains_weights:
        return
    if (model.quantization, model.quantize_embedding, model.quantize_head) != ("none", "keep", "keep"):
        yield (
            f"method.type: {method.type} trains the weights that model.quantization, quantize_embedding and "
            "quantize_head would pack; leave these out, or use method.type: lora"
        )
    if objective.runs_reference:
        yield (
            f"objective.type: {objective.type} compares with the base model, of which method.type: {method.type} "
            "leaves nothing; use method.type: lora, or give objective.reference: rows"
        )


def _training_problems(spec: JobParts) -> Iterator[str]:
    training, answers = spec.training, spec.objective.answers_per_row
    num_rows = training.batch_size * answers
    if training.micro_batch_size is not None and training.micro_batch_size > num_rows:
        of_answers = f" x {answers} answers" if answers > 1 else ""
        yield (
            f"training.micro_batch_size: {training.micro_batch_size} is more than a step's {num_rows} rows "
            f"(training.batch_size: {training.batch_size}{of_answers}); set it to {num_rows} or less, or leave it out: "
            "the plan then chooses it"
        )
    if training.micro_batch_cut != "tokens":
        return
    if virtual := spec.method.prompt_tokens + spec.method.past_tokens:
        yield (
            f"training.micro_batch_cut: tokens lets short rows share a micro-batch in larger numbers, and method.type: "
            f"{spec.method.type} puts {virtual} virtual tokens before each, for which no memory is planned; set it to "
            "rows or auto"
        )
    if answers > 1:
        yield (
            f"training.micro_batch_cut: tokens is not known to objective.type: {spec.objective.type}, whose sampled "
            "answers are cut into equal numbers of rows; set it to rows or auto"
        )


def _activation_cache_problems(spec: JobParts) -> Iterator[str]:
    if spec.training.activation_cache == "off":
        return
    method = spec.method
    if not method.leaves_blocks_alone and not method.may_freeze_blocks(EMBEDDING_NAMES):
        upper = "train in upper blocks alone (method.blocks: last 4), " if "blocks" in type(method).model_fields else ""
        yield (
            f"training.activation_cache keeps what the model's blocks give, which method.type: {method.type} "
            f"changes with every step; {upper}set it to off, or use method.type: parallel_adapters"
        )
    trained = [task for task in spec.data.sources if task.train is not None]
    if spec.objective.answers_per_row > 1:
        yield (
            f"training.activation_cache keeps what the rows give, and objective.type: {spec.objective.type} samples "
            "other ones for every step; leave it off"
        )
    if spec.data.packing or len(trained) > 1 or spec.objective.runs_reference:
        yield (
            "training.activation_cache repeats the first epoch's micro-batches of one data set; it goes with "
            "neither data.packing nor several trained tasks nor a reference: leave it off"
        )


def _held_out_problems(spec: JobParts) -> Iterator[str]:
    if spec.data.has_eval:
        return
    training = spec.training
    wants = [
        name
        for name, wanted in (
            ("training.eval_every", training.eval_every is not None),
            ("training.keep_best", training.keep_best),
            ("training.early_stopping", training.early_stopping is not None),
            ("scoring", spec.scoring is not None and not any(task.eval for task in spec.data.sources)),
        )
        if wanted
    ]
    if wants:
        yield f"{', '.join(wants)} need held-out rows: set data.eval"


def _scoring_problems(spec: JobParts) -> Iterator[str]:
    scoring = spec.scoring
    if spec.training.steps == 0 and (scoring is None or spec.output.publish):
        yield "training.steps: 0 trains nothing: set scoring and output.publish: false, or more steps"
    if scoring is not None and scoring.rows is not None and spec.data.tasks:
        yield "scoring.rows counts the rows of a single data set; leave it out beside data.tasks"


def _packing_problems(spec: JobParts) -> Iterator[str]:
    if not spec.data.packing:
        return
    if spec.objective.row_use not in ("answers", "text") or spec.objective.answers_per_row > 1:
        yield (
            f"data.packing: rows of objective.type: {spec.objective.type} are scored one by one and cannot share a "
            "sequence; leave it out"
        )
    if spec.method.prompt_tokens or spec.method.past_tokens:
        yield (
            f"data.packing: method.type: {spec.method.type} puts its virtual tokens before a whole sequence, which "
            "only its first row would follow; set one of the two off"
        )


def _codec_problems(spec: JobParts) -> Iterator[str]:
    if spec.objective.row_use == "source_target" and spec.placement.codec == "bf16":
        yield (
            f"placement.codec: bf16 knows borders that one text's states cross, objective.type: {spec.objective.type} "
            "sends two; set it to raw"
        )


def _metric_problems(spec: JobParts) -> Iterator[str]:
    if spec.scoring is None:
        return
    objective = spec.objective
    allowed = {objective.own_metric}
    if objective.counted != "rows":
        allowed.add("perplexity")
    if objective.row_use in ("answers", "source_target"):
        allowed.update(GENERATED_METRICS)
    for task in spec.data.sources:
        metric = spec.metric_of(task)
        if task.eval is not None and metric not in allowed:
            yield (
                f"scoring: {metric} is no metric of objective.type: {objective.type}, which has "
                f"{', '.join(sorted(allowed))}"
            )
