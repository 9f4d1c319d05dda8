"""A client of the hub: which files a model has, and byte ranges of them, over HTTPS.

Speaks what is needed: a model's description (``/api/models/.../revision/...``) and ranges of a file at a commit
(``resolve``), through the redirects to whatever store holds the bytes. The token of a gated model goes to the hub's own
host and is neither logged nor part of an error; requests takes it off at a redirect to another host.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
import urllib3
from requests.auth import AuthBase

from plutino.errors import ModelError
from plutino.hub_id import HubId

DEFAULT_ENDPOINT = "https://huggingface.co"
PIECE_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 5.0
STALLED_AFTER_S = 20.0
"""A server that sends nothing for so long is given up."""
NUM_ATTEMPTS = 5
LONGEST_WAIT_S = 60.0
"""A server that asks for a longer pause is not waited for."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)", re.ASCII)


class HubError(ModelError):
    """The hub did not give what was asked for.

    Args:
        message: what happened, and the way out.
        is_final: asking again, or for another file of the model, gives nothing else.
        is_silent: it cannot be reached, or sends nothing; that may pass.
    """

    def __init__(self, message: str, *, is_final: bool, is_silent: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.is_silent = is_silent


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a model."""

    num_bytes: int
    sha256: str | None
    """Of its content, where the hub knows it: for large files."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model at one commit."""

    commit: str
    files: Mapping[str, HubFile]


class HubClient:
    """Blocking client; every thread needs one of its own or none at the same time.

    Args:
        endpoint: the hub; by default ``HF_ENDPOINT`` or huggingface.co.
        token: for gated and private models; by default ``HF_TOKEN`` or what ``hf auth login`` has stored.
        sleep: waits between attempts.
        stalled_after_s: silence after which a transfer is given up.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        token: str | None = None,
        sleep: Callable[[float], object] = time.sleep,
        stalled_after_s: float = STALLED_AFTER_S,
    ) -> None:
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._auth = _Bearer(token or find_token())
        self._sleep = sleep
        self._timeout_s = (CONNECT_TIMEOUT_S, stalled_after_s)
        self._session = requests.Session()
        # Lengths and ranges count the stored bytes.
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": "plutino"})

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def describe(self, hub_id: HubId) -> HubModel:
        """The commit that a revision is now, and the files there.

        Raises:
            HubError: there is no such model, it is gated, or the hub does not answer.
        """
        url = f"{self.endpoint}/api/models/{hub_id.repository}/revision/{quote(hub_id.revision, safe='')}?blobs=true"
        with self._get(url, str(hub_id), {}) as response:
            try:
                body = response.content
            except requests.RequestException as error:
                raise self._broken(str(hub_id), error) from error
            try:
                values = json.loads(body)
                files = {
                    str(file["rfilename"]): HubFile(int(file["size"]), (file.get("lfs") or {}).get("sha256"))
                    for file in values["siblings"]
                }
                return HubModel(str(values["sha"]), files)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HubError(
                    f"{self.endpoint} describes {hub_id} in a way that cannot be read ({error!r}); is it a hub?",
                    is_final=True,
                ) from error

    def stream(self, hub_id: HubId, file: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes ``[start, end)`` of a file at a commit, in pieces as they come.

        Raises:
            HubError: it is refused, gone or changed, or the transfer breaks or stalls.
        """
        assert hub_id.is_pinned, f"{hub_id} may change while it is read"
        if start == end:
            return
        what = f"{file} of {hub_id.repository}"
        url = f"{self.endpoint}/{hub_id.repository}/resolve/{hub_id.revision}/{quote(file)}"
        with self._get(url, what, {"Range": f"bytes={start}-{end - 1}"}) as response:
            commit = (response.history[0] if response.history else response).headers.get("X-Repo-Commit")
            if commit not in (None, hub_id.revision):
                raise HubError(f"{self.endpoint} gave commit {commit} of {what}, asked for {hub_id}", is_final=True)
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if response.status_code != 206 or match is None or (int(match[1]), int(match[2])) != (start, end - 1):
                raise HubError(
                    f"{self.endpoint} answered a request for bytes {start}-{end - 1} of {what} with status "
                    f"{response.status_code} and range {response.headers.get('Content-Range')!r}; it serves no ranges",
                    is_final=True,
                )
            left_bytes = end - start
            try:
                # What has come, at once: iter_content would wait for whole pieces and lose a broken one.
                while piece := response.raw.read1(PIECE_BYTES):
                    left_bytes -= len(piece)
                    if left_bytes < 0:
                        raise HubError(f"{self.endpoint} sent more of {what} than was asked for", is_final=True)
                    yield piece
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise self._broken(what, error) from error
            if left_bytes:
                raise HubError(f"{self.endpoint} broke off {what}, {left_bytes} bytes are missing", is_final=False)

    def _get(self, url: str, what: str, headers: Mapping[str, str]) -> requests.Response:
        """The answer to a request, from its headers on; tried again where that may help."""
        for attempt in range(1, NUM_ATTEMPTS + 1):
            try:
                response = self._session.get(
                    url, headers=headers, stream=True, timeout=self._timeout_s, auth=self._auth, allow_redirects=True
                )
            except requests.RequestException as error:
                raise self._broken(what, error, is_silent=True) from error
            if response.ok:
                return response
            response.close()
            status = response.status_code
            asked_s = _retry_after_s(response.headers.get("Retry-After"))
            wait_s = _backoff_s(attempt) if asked_s is None else asked_s
            is_passing = status == 429 or status >= 500
            if not is_passing or attempt == NUM_ATTEMPTS or wait_s > LONGEST_WAIT_S:
                raise self._refused(what, status, asked_s, attempt)
            self._sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, what: str, status: int, asked_s: float | None, attempts: int) -> HubError:
        match status:
            case 401 | 403 if not self._auth.has_token:
                why = (
                    "it is gated, private or does not exist: accept its terms on its page, then set HF_TOKEN, or run "
                    "hf auth login, where plutino runs"
                )
            case 401 | 403:
                why = "the token in use may not read it: accept the model's terms on its page with that token's account"
            case 404:
                why = "there is no such model, revision or file; check model.path (organisation/name[@revision])"
            case 429:
                wait = "" if asked_s is None else f" and asks for a pause of {asked_s:.0f} s"
                why = f"it limits requests{wait}; wait, or set HF_TOKEN for a higher limit"
            case _:
                why = f"it failed {attempts} times; try again later"
        return HubError(
            f"{self.endpoint} refused {what} with status {status}: {why}", is_final=status in (401, 403, 404, 429)
        )

    def _broken(self, what: str, error: Exception, *, is_silent: bool = False) -> HubError:
        # Not the error's own text: it may hold a signed address.
        if isinstance(error, (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError)):
            how, is_silent = f"sent nothing for {self._timeout_s[1]:g} s", True
        else:
            how = f"{'cannot be reached' if is_silent else 'broke off'} ({type(error).__name__})"
        return HubError(
            f"{self.endpoint} {how} while {what} was read; check the network, or use a model folder",
            is_final=False,
            is_silent=is_silent,
        )


def find_token() -> str | None:
    """The user's hub token, where huggingface_hub would find it too."""
    if token := (os.environ.get("HF_TOKEN") or "").strip():
        return token
    home = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


class _Bearer(AuthBase):
    """Puts the token, and nothing that requests would find in a .netrc, into a request."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def has_token(self) -> bool:
        return self._token is not None

    def __call__(self, request: Any) -> Any:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def __repr__(self) -> str:
        return f"_Bearer(has_token={self.has_token})"


def _backoff_s(attempt: int) -> float:
    return 0.5 * 2.0 ** (attempt - 1) * random.uniform(0.75, 1.25)


def _retry_after_s(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
