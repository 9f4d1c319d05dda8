"""Events of a small job, from its submission to its adapter."""

from __future__ import annotations

from partitioner.plan import Plan, StagePlan
from plutino import events
from plutino.sizes import MIB

NAMES = ("alpha", "beta")


def plan() -> Plan:
    stages = tuple(
        StagePlan(
            stage_index=index,
            start_block=2 * index,
            end_block=2 * index + 2,
            agent_ids=(f"id-{name}",),
            device_names=(name,),
            forward_s=0.01,
            backward_s=0.02,
            memory=(),
            job_bytes=60 * MIB,
            baseline_bytes=300 * MIB,
            budget_bytes=400 * MIB,
            threads=1,
        )
        for index, name in enumerate(NAMES)
    )
    return Plan(
        stages=stages,
        micro_batch_rows=4,
        num_micro_batches=4,
        micro_batch_owners=((0,), (0,)),
        checkpointing=False,
        dtype="fp32",
        codec="raw",
        step_s=0.2,
        bubble_share=0.25,
        bottleneck="stage 1",
        relief="one device more",
    )


def worker(index: int) -> events.WorkerName:
    return events.WorkerName(stage_index=index, device_name=NAMES[index])


def step(number: int, loss: float, *, busy_share: float = 0.5) -> events.StepCommitted:
    times = tuple(
        events.WorkerStepTimes(
            worker=worker(index),
            total_s=2.0,
            compute_s=2.0 * busy_share,
            wait_s=0.1,
            serialise_s=0.0,
            commit_s=0.0,
            sent_bytes=0,
            rss_bytes=340 * MIB,
            peak_rss_bytes=(350 + index) * MIB,
        )
        for index in range(len(NAMES))
    )
    return events.StepCommitted(
        step=number,
        plan_epoch=1,
        loss=loss,
        grad_norm=1.0,
        clip_scale=1.0,
        lr=1e-3,
        tokens=100,
        label_tokens=10,
        seconds=2.0,
        commit_s=0.001,
        workers=times,
    )


def state(name: str, *, next_step: int = 0, reason: str = "") -> events.JobStateChanged:
    return events.JobStateChanged(state=name, reason=reason, next_step=next_step, total_steps=2)


def score(when: str, share: float, answer: str) -> events.ScoringDone:
    row = events.ScoredRow(prompt="play some jazz", expected="PlayMusic", answer=answer, is_right=share > 0.5)
    return events.ScoringDone(when=when, num_rows=4, metrics={"exact_match": share}, sample_rows=(row,), seconds=1.0)


def history() -> list[events.JobEvent]:
    return [
        state("submitted"),
        events.DataRead(num_train_rows=8, num_eval_rows=4, total_steps=2),
        events.PlanMade(plan_epoch=1, plan_json=plan().model_dump_json(), search_s=0.01),
        state("running"),
        score("before", 0.0, "once upon a time"),
        step(0, 3.0),
        step(1, 1.5),
        state("finalizing", next_step=2, reason="all 2 steps are done"),
        score("after", 0.75, "PlayMusic"),
        events.Exported(
            adapter_dir="/out/adapter",
            bytes=2 * MIB,
            num_tensors=4,
            checks=(events.Verification(name="reload", result="equal"),),
            loading_code='model = AutoPeftModelForCausalLM.from_pretrained("/out/adapter")',
            measures=(("perplexity on general text, trained", "12.50"),),
        ),
        state("succeeded", next_step=2),
    ]
