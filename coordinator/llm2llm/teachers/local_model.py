"""A teacher that is a folder of transformers.

A process of its own for each wave of questions, gone when they are answered, so that the coordinator holds neither
torch nor weights.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from coordinator.artifacts.verify_process import module_environment
from coordinator.llm2llm.teachers.base import Ask, Reply, Take
from plutino.errors import JobError
from plutino.llm2llm import LocalModelTeacher

MODULE = "coordinator.llm2llm.teachers.local_model_process"
_MOST_LINE_BYTES = 1 << 20
_STDERR_TAIL_CHARS = 2000


class LocalModel:
    """Implements :class:`coordinator.llm2llm.teachers.base.TeacherHandle`."""

    def __init__(self, config: LocalModelTeacher) -> None:
        self._config = config

    async def answer(self, asks: Sequence[Ask], take: Take) -> None:
        """See :class:`coordinator.llm2llm.teachers.base.TeacherHandle`.

        Raises:
            JobError: the process failed, or did not end in time; replies that it gave are taken.
        """
        with tempfile.TemporaryDirectory(prefix="plutino-teacher-") as folder:
            request = Path(folder) / "request.json"
            questions = [[{"role": turn.role, "content": turn.content} for turn in ask.turns] for ask in asks]
            seeds = [f"{self._config.seed} {ask.key}" for ask in asks]
            request.write_text(
                json.dumps({"config": self._config.model_dump(mode="json"), "questions": questions, "seeds": seeds})
            )
            with (Path(folder) / "stderr").open("w+b") as stderr:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "coordinator.leash", "-m", MODULE, str(request)),
                    # Its end of this pipe is what it hangs on: it ends when the coordinator does.
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=stderr,
                    env=module_environment(),
                    limit=_MOST_LINE_BYTES,
                )
                try:
                    await asyncio.wait_for(self._replies(process, asks, take), self._config.time_limit_s)
                except asyncio.TimeoutError:
                    raise JobError(
                        f"the teacher {self._config.path} did not answer {len(asks)} questions within "
                        f"{self._config.time_limit_s:.0f} s; raise teacher.time_limit_s, then resume the loop"
                    ) from None
                finally:
                    if process.returncode is None:
                        process.kill()
                    await process.wait()
                if process.returncode != 0:
                    stderr.seek(0)
                    tail = stderr.read().decode(errors="replace").strip()[-_STDERR_TAIL_CHARS:]
                    raise JobError(
                        f"the teacher {self._config.path} ended with exit code {process.returncode}; mend the cause, "
                        f"then resume the loop. Its last output:\n{tail}"
                    )

    async def _replies(self, process: asyncio.subprocess.Process, asks: Sequence[Ask], take: Take) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            values = json.loads(line)
            await take(asks[values["question"]], Reply(values["text"]))
        await process.wait()
