"""A teacher behind OpenAI's chat completions.

Bounded in time and bytes; its key is read when it is used, and told nowhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence

import requests

from coordinator.llm2llm.teachers.base import Ask, Reply, Take
from plutino.errors import ConfigError
from plutino.llm2llm import EndpointTeacher

_MOST_BYTES = 1 << 17
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0


class _TryAgainError(Exception):
    """The same question may get an answer later."""

    def __init__(self, text: str, after_s: float | None = None) -> None:
        super().__init__(text)
        self.after_s = after_s


class Endpoint:
    """Implements :class:`coordinator.llm2llm.teachers.base.TeacherHandle`.

    Args:
        config: where it is.
        sleep: waits between two attempts; tests give one that does not.
    """

    def __init__(self, config: EndpointTeacher, sleep: Callable[[float], None] = time.sleep) -> None:
        self._config = config
        self._sleep = sleep

    async def answer(self, asks: Sequence[Ask], take: Take) -> None:
        """See :class:`coordinator.llm2llm.teachers.base.TeacherHandle`."""
        key = self._key()
        slots = asyncio.Semaphore(self._config.concurrency)

        async def one(ask: Ask) -> None:
            async with slots:
                reply = await asyncio.to_thread(self._ask, ask, key)
            await take(ask, reply)

        tasks = [asyncio.create_task(one(ask)) for ask in asks]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _key(self) -> str | None:
        name = self._config.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "")
        if not key:
            raise ConfigError(
                f"teacher.api_key_env: the coordinator's environment has no {name}; set it and start the coordinator "
                "again, then resume the loop"
            )
        return key

    def _ask(self, ask: Ask, key: str | None) -> Reply:
        wait_s = _FIRST_WAIT_S
        for left in reversed(range(self._config.retries + 1)):
            try:
                return self._try(ask, key)
            except _TryAgainError as error:
                if left == 0:
                    return Reply(None, f"{error} ({self._config.retries + 1} attempts)")
                self._sleep(min(error.after_s if error.after_s is not None else wait_s, _LONGEST_WAIT_S))
                wait_s *= 2
        raise AssertionError("the last attempt returns")

    def _try(self, ask: Ask, key: str | None) -> Reply:
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in ask.turns],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        deadline_s = time.monotonic() + config.timeout_s
        try:
            with requests.post(
                f"{config.url.rstrip('/')}/chat/completions",
                json=body,
                headers={} if key is None else {"Authorization": f"Bearer {key}"},
                timeout=config.timeout_s,
                stream=True,
                # A redirect could carry the key elsewhere.
                allow_redirects=False,
            ) as response:
                text = _read(response, deadline_s)
        except (requests.RequestException, TimeoutError) as error:
            # Its own text may quote the request; the kind of failure says enough.
            raise _TryAgainError(f"the endpoint gave no answer: {type(error).__name__}") from None
        if response.status_code == 429 or response.status_code >= 500:
            raise _TryAgainError(f"the endpoint answered {response.status_code}", _retry_after(response))
        if response.status_code != 200:
            return Reply(None, f"the endpoint answered {response.status_code}")
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return Reply(None, "the endpoint's answer is no chat completion")
        return Reply(content) if isinstance(content, str) else Reply(None, "the endpoint's answer has no text")


def _read(response: requests.Response, deadline_s: float) -> bytes:
    """The body. Byte by byte: a larger piece would wait for its end, however slowly a server sends it."""
    parts, num_bytes = [], 0
    for part in response.iter_content(1):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > _MOST_BYTES or time.monotonic() > deadline_s:
            raise TimeoutError
    return b"".join(parts)


def _retry_after(response: requests.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
