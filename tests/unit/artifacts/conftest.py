"""Stages' parts, a bulk store in memory and facts for a card."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from coordinator.artifacts.card import CardFacts, DataFile, Evaluation, ScoreFacts, TrainingLosses
from plutino.errors import FrameError, UnknownJobError
from plutino.job.method import LoraConfig
from plutino.job.objective import SftConfig
from plutino.job.spec import JobSpec
from plutino.job.training import TrainingConfig

MODEL_DIR = Path(__file__).resolve().parents[3] / "plutino" / "assets" / "models" / "tiny-llama-7m"


class MemoryBulk:
    """The bulk process as a dict; refuses what does not have the promised sha256."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put_shadow(self, job_id: str, shadow_id: str, data: bytes, sha256: str) -> None:
        assert hashlib.sha256(data).hexdigest() == sha256
        self.files[shadow_id] = bytes(data)

    def get_shadow(self, job_id: str, shadow_id: str, sha256: str) -> bytearray:
        if shadow_id not in self.files:
            raise UnknownJobError(f"job {job_id} has no shadow {shadow_id}")
        found = hashlib.sha256(self.files[shadow_id]).hexdigest()
        if found != sha256:
            raise FrameError(f"shadow {shadow_id} has sha256 {found}, expected {sha256}")
        return bytearray(self.files[shadow_id])

    def put_part(self, shadow_id: str, parameters: dict[str, np.ndarray]) -> str:
        """Store a stage's training state as workers do; returns its sha256."""
        tensors: dict[str, np.ndarray] = {}
        for name, value in parameters.items():
            tensors[f"param/{name}"] = value
            tensors[f"exp_avg/{name}"] = np.ones_like(value)
            tensors[f"exp_avg_sq/{name}"] = np.ones_like(value)
            tensors[f"adam_step/{name}"] = np.array(7.0, np.float32)
        self.files[shadow_id] = save(tensors)
        return hashlib.sha256(self.files[shadow_id]).hexdigest()


@pytest.fixture
def bulk() -> MemoryBulk:
    return MemoryBulk()


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec.model_validate({"model": {"path": str(MODEL_DIR)}, "data": {"train": "rows.jsonl"}})


@pytest.fixture
def make_facts() -> Callable[..., CardFacts]:
    def make(**changes: object) -> CardFacts:
        facts = CardFacts(
            job_name="intents",
            base_path=str(MODEL_DIR),
            base_hash="b" * 64,
            data=(DataFile(use="training", name="train.jsonl", sha256="d" * 64, num_rows=120),),
            method=LoraConfig(rank=4),
            objective=SftConfig(),
            training=TrainingConfig(steps=30),
            dtype="fp32",
            plan_text="stage 0: blocks 0-3 on a",
            num_steps=30,
            losses=TrainingLosses(first=3.25, last=0.5, best=0.25),
            evaluations=(Evaluation(step=30, loss=0.625),),
            score_before=ScoreFacts(num_rows=40, values={"exact_match": 0.0}),
            score_after=ScoreFacts(num_rows=40, values={"exact_match": 0.75}),
            checks=(("stock peft", "112 tensors"), ("workers", "largest difference 0 over 3 stages")),
            num_trained=1234,
            trained_share=0.005,
            measures=(("mean reward, first and last 3 of 30 steps", "0.1, 0.5"),),
            was_reloaded=True,
            versions={"torch": "2.13.0"},
            training_s=61.0,
            date="2026-01-02",
        )
        return facts.model_copy(update=changes)

    return make
