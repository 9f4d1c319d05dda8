"""The teacher that is a folder of transformers, in its real process; slow for that process's imports."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from coordinator.llm2llm.teachers.base import Ask, Turn
from coordinator.llm2llm.teachers.local_model import LocalModel
from plutino.assets import TINY_LLAMA_DIR
from plutino.errors import JobError
from plutino.llm2llm import LocalModelTeacher

pytestmark = pytest.mark.slow


def answers(path, *keys):
    replies = {}

    async def take(ask, reply):
        replies[ask.key] = reply.text

    asks = [Ask(key, (Turn("system", "rules"), Turn("user", f"say {key}")), "{}", 0) for key in keys]
    config = LocalModelTeacher(path=str(path), max_new_tokens=6, time_limit_s=50)
    asyncio.run(LocalModel(config).answer(asks, take))
    return replies


def test_local_model_answers_a_question_alike_whatever_was_asked_before_it():
    several = answers(TINY_LLAMA_DIR, "one", "two")
    assert set(several) == {"one", "two"} and any(several.values())
    assert answers(TINY_LLAMA_DIR, "two") == {"two": several["two"]}


def test_local_model_that_cannot_be_loaded_tells_its_last_words(tmp_path):
    shutil.copy(TINY_LLAMA_DIR / "config.json", tmp_path)
    with pytest.raises(JobError, match=r"exit code 1.*resume the loop"):
        answers(tmp_path, "one")
