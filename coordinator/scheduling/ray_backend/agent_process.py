"""An agent as a child of a Ray actor's process: started with a token, ended with its actor. Knows nothing of Ray.

The folder of an agent holds its token, its key and its logs, and goes with it. Where the actor's process was killed,
the agent ends by its leash (:mod:`coordinator.leash`), and the folder is removed at the next start on the machine.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import coordinator
from plutino.security.identity import write_private

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "plutino-agent-"
_LOCK_FILE = "lock"
_NUM_LAST_WORDS = 12
_END_WITHIN_S = 8.0
"""An agent gives its workers 2 s."""
_CLEAR_WITHIN_S = 2.0
"""Until its folder is removed."""


class AgentProcess:
    """One agent at a time."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._is_ended = False
        self._is_cleared = threading.Event()
        self._is_cleared.set()

    def run(self, token: str, arguments: Sequence[str], module: str = "edge_node.cli") -> str:
        """Start the agent with a join token and wait for its end, however far that is; how it ended.

        What it prints is printed here.

        Args:
            token: lets it in; it goes through a private file, because others see a process's arguments.
            arguments: options of ``plutino-node join``.
            module: the program.
        """
        _remove_left_over(Path(tempfile.gettempdir()))
        self._is_cleared.clear()
        try:
            with _own_folder() as folder:
                return self._run(token, arguments, module, folder)
        finally:
            self._is_cleared.set()

    def _run(self, token: str, arguments: Sequence[str], module: str, folder: Path) -> str:
        token_path = folder / "token"
        write_private(token_path, token.encode())
        command = [sys.executable, "-m", "coordinator.leash", "-m", module, "join", "--token-file", str(token_path)]
        with self._changing:
            if self._is_ended:
                return "it was told to end before it started"
            process = self._process = subprocess.Popen(
                [*command, "--state-dir", str(folder / "state"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=_environment(os.environ),
                # Signals to the actor's process group are none of the agent's business.
                start_new_session=True,
            )
        assert process.stdin is not None and process.stdout is not None
        last_words: deque[str] = deque(maxlen=_NUM_LAST_WORDS)
        with process.stdin, process.stdout:
            for line in process.stdout:
                print(line, end="", flush=True)
                last_words.append(line)
            code = process.wait()
        return f"exit code {code}: {''.join(last_words).strip()}"

    def end(self) -> None:
        """End the agent in good order, by force if it takes too long; none starts here any more."""
        with self._changing:
            self._is_ended = True
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                logger.warning("the agent did not end within %.0f s; killing it", _END_WITHIN_S)
                process.kill()
                process.wait()
        self._is_cleared.wait(_CLEAR_WITHIN_S)


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Ray's secrets and its guesses at thread counts are not for agents; the source of this very program is."""
    kept = {key: value for key, value in inherited.items() if not key.startswith("RAY_") and key != "OMP_NUM_THREADS"}
    source_dir = str(Path(coordinator.__file__).resolve().parents[1])
    paths = [source_dir, *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


@contextmanager
def _own_folder() -> Iterator[Path]:
    draft = Path(tempfile.mkdtemp(prefix=f"new-{FOLDER_PREFIX}"))
    folder = draft.with_name(draft.name.removeprefix("new-"))
    try:
        with (draft / _LOCK_FILE).open("w") as lock:
            # Locked before it has the name that others look for.
            fcntl.flock(lock, fcntl.LOCK_EX)
            draft.rename(folder)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_over(parent: Path) -> None:
    """Remove folders of agents whose actor was killed: they hold keys of devices that are no members any more."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            with (folder / _LOCK_FILE).open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except OSError as error:
            # In use, being made, or another user's.
            logger.debug("%s stays: %s", folder, error)
