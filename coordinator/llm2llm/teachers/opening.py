"""From a teacher's config to the teacher."""

from __future__ import annotations

from pathlib import Path

from coordinator.jobs.manager import JobManager
from coordinator.llm2llm.teachers.base import TeacherHandle
from coordinator.llm2llm.teachers.endpoint import Endpoint
from coordinator.llm2llm.teachers.local_model import LocalModel
from coordinator.llm2llm.teachers.pipeline import PipelineModel
from coordinator.llm2llm.teachers.recorded import RecordedAnswers
from coordinator.storage.base import Store
from plutino.llm2llm import EndpointTeacher, LocalModelTeacher, LoopSpec, PipelineTeacher, RecordedTeacher


def open_teacher(spec: LoopSpec, *, name: str, folder: Path, jobs: JobManager, store: Store) -> TeacherHandle:
    """The loop's teacher.

    Args:
        spec: the loop.
        name: its id.
        folder: where its files lie.
        jobs: runs jobs of a teacher that is split over devices.
        store: has what came of them.

    Raises:
        PlutinoError: it cannot be used.
    """
    match spec.loop.teacher:
        case RecordedTeacher() as config:
            return RecordedAnswers(config)
        case EndpointTeacher() as config:
            return Endpoint(config)
        case LocalModelTeacher() as config:
            return LocalModel(config)
        case PipelineTeacher() as config:
            return PipelineModel(config, spec.job, name=name, folder=folder, jobs=jobs, store=store)
