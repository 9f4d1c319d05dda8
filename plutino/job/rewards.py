"""What an answer that the model sampled is worth: the sources of rewards that a job may name."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from plutino.job.base import SpecPart


class _Source(SpecPart):
    weight: float = 1.0
    """An answer's reward is the sum of what its sources give, each times its weight."""


class ExactMatchReward(_Source):
    """1 if the answer is the row's own but for outer white space, else 0."""

    type: Literal["exact_match"] = "exact_match"


class RegexReward(_Source):
    """1 if the pattern is found in the answer, else 0."""

    type: Literal["regex"] = "regex"
    pattern: str
    """Python's regular expressions; ``^...$`` for the whole answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern


class ValidJsonReward(_Source):
    """1 if the answer is a JSON value, else 0."""

    type: Literal["valid_json"] = "valid_json"


class FunctionReward(_Source):
    """What a Python function of yours gives: ``f(prompt: str, answer: str, truth: str) -> float``.

    It runs on the coordinator's side, in a process of its own. Give the same number for the same texts: rewards are
    kept with their rollouts, and a job that loses both asks again.
    """

    type: Literal["function"] = "function"
    function: str
    """``FILE.py:NAME``; a relative path is taken from the job file's folder."""
    time_limit_s: float = Field(10.0, gt=0)
    """Of one answer; the first one's includes the file's imports."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str) -> str:
        path, _, name = function.rpartition(":")
        if not path.endswith(".py") or not name.isidentifier():
            raise ValueError("give the file and the function in it: rewards.py:my_reward")
        return function


class AdapterReward(_Source):
    """What a reward adapter of the same base model gives: the result of a job with ``objective.type: reward``."""

    type: Literal["adapter"] = "adapter"
    path: str
    """Its folder, on the coordinator. A relative path is taken from the job file's folder."""


RewardSource = Annotated[
    ExactMatchReward | RegexReward | ValidJsonReward | FunctionReward | AdapterReward, Field(discriminator="type")
]
"""Union of all sources' configs, told apart by ``type``."""
