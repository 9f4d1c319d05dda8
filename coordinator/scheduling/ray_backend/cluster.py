"""Ray's daemons: an embedded Ray that belongs to this coordinator alone, or a cluster that somebody else runs.

Entry points: :class:`EmbeddedCluster` and :class:`JoinedCluster`. Their methods block. ``import ray`` takes half a
second and reads the environment, so it happens inside functions, after the environment is set.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import secrets
import socket
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, Protocol

import coordinator
from coordinator.scheduling.ray_backend.reaping import (
    SESSION_PREFIX,
    ProcessRecord,
    RecordedProcess,
    forget,
    is_running,
    process_tree,
    read_record,
    reap,
    write_record,
)
from plutino.errors import ConfigError, PlutinoError, SecurityError, UnreachableError
from plutino.sizes import MIB

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 * MIB
"""Ray refuses less than 75 MiB. Only rounds of scheduling and their answers pass through it."""

_VITAL_DAEMONS = frozenset({"gcs_server", "raylet"})
"""Without these no call gets anywhere. Ray ends a process that has missed its gcs_server for 60 s (measured: exit
status 1, no exception), and that process would be the coordinator; so their death must be seen earlier."""

_START_ATTEMPTS = 2
"""On a machine that is busy Ray may miss its own limits (30 s for its first daemon to answer)."""

_REACH_WITHIN_S = 5.0

_SOCKET_PATH_BYTES = 107
_SOCKET_SUFFIX_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")

_ENVIRONMENT = {
    # Otherwise a call that comes after shutdown starts another Ray, configured by nobody.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Asks for the behaviour that Ray warns it will have one day; actors here ask for no accelerator.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_EMBEDDED_ENVIRONMENT = {
    **_ENVIRONMENT,
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The one switch that makes every daemon and worker listen on loopback: Ray replaces a node address of 127.0.0.1 by
    # the machine's own unless "clusters are not supported here". Without it six ports are open on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class Cluster(Protocol):
    """Where actors run."""

    def start(self) -> None:
        """Connect this process to Ray, starting it where it is ours."""

    def stop(self) -> None:
        """Undo :meth:`start`; harmless without it."""

    def kill(self) -> None:
        """Kill the daemons that are ours, so that a :meth:`stop` that waits for one of them goes on."""

    def is_alive(self) -> bool:
        """Whether calls can get anywhere, as far as that can be seen from here at once."""

    def record(self) -> None:
        """Bring the record of processes up to date."""


class EmbeddedCluster:
    """Ray on this machine only: loopback, own token, own folder; nothing of it outlives the coordinator for long.

    The kernel kills the daemons when the *thread* that started them ends (PR_SET_PDEATHSIG), so :meth:`start` must be
    called on a thread that lives until :meth:`stop`.
    """

    def __init__(self, state_dir: Path) -> None:
        self._dir = state_dir / "ray"
        self._record_path = self._dir / "processes.json"
        self._record: ProcessRecord | None = None
        self._vital: tuple[RecordedProcess, ...] = ()

    def start(self) -> None:
        """Reap what an earlier incarnation left, then start a fresh Ray.

        Raises:
            StoreError: the record of the earlier incarnation's processes is damaged.
            SecurityError: Ray does not listen on loopback only; it was stopped again.
            PlutinoError: Ray does not start.
        """
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._reap_earlier()
        for attempts_left in reversed(range(_START_ATTEMPTS)):
            try:
                self._start_once()
                return
            except PlutinoError:
                self.stop()
                raise
            except Exception as error:  # Ray raises plain ones
                self.stop()
                if not attempts_left:
                    raise PlutinoError(f"Ray does not start: {error}; use --engine local to do without it") from error
                logger.warning("Ray does not start, trying once more: %s", error)

    def stop(self) -> None:
        """Disconnect, end every process of this Ray and remove its folder and record."""
        if self._record is None:
            return
        # Workers end when they notice that their raylet has; those that do not are killed below.
        self.record()
        _shut_ray_down()
        forget(self._record_path, self._record)
        self._record, self._vital = None, ()

    def kill(self) -> None:
        """See :class:`Cluster`."""
        if self._record is not None:
            reap(self._record.processes)

    def is_alive(self) -> bool:
        """See :class:`Cluster`; a daemon that hangs counts as alive."""
        return self._record is not None and all(map(is_running, self._vital))

    def record(self) -> None:
        """Write down which processes are below this one for Ray, if that has changed."""
        if self._record is None:
            return
        found = process_tree(os.getpid(), mark=str(self._record.session_dir))
        # Those that have lost their parent are still ours to end.
        orphans = tuple(known for known in self._record.processes if known not in found and is_running(known))
        if not self._vital:
            self._vital = tuple(process for process in found if process.name in _VITAL_DAEMONS)
        if set(found + orphans) != set(self._record.processes):
            self._save(self._record.model_copy(update={"processes": found + orphans}))

    def _start_once(self) -> None:
        session_dir = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=_short_tempdir()))
        self._save(ProcessRecord(session_dir=session_dir))
        os.environ.update(_EMBEDDED_ENVIRONMENT, RAY_AUTH_TOKEN_PATH=str(self._new_token()))
        node_address = _init_ray(
            address="local",
            num_cpus=os.cpu_count(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            namespace="plutino",
            _node_ip_address="127.0.0.1",
            # Ray opens its folder to everybody, and its unix sockets ask for no token; the parent keeps it private.
            _temp_dir=str(session_dir / "r"),
        )
        self.record()
        if not ipaddress.ip_address(node_address).is_loopback:
            raise SecurityError(
                f"Ray took {node_address} as its address, where other machines reach it; it was probably imported "
                "before the coordinator could configure it; use --engine local"
            )
        if {process.name for process in self._vital} != _VITAL_DAEMONS:
            raise PlutinoError(
                f"Ray runs without {' and '.join(sorted(_VITAL_DAEMONS))} below the coordinator's process, so their "
                "death would not be seen; use --engine local, or a version of Ray that plutino knows"
            )

    def _save(self, record: ProcessRecord) -> None:
        write_record(self._record_path, record)
        self._record = record

    def _reap_earlier(self) -> None:
        earlier = read_record(self._record_path)
        if earlier is None:
            return
        alive = forget(self._record_path, earlier)
        names = ", ".join(f"{process.name} ({process.pid})" for process in alive)
        logger.warning("an earlier coordinator did not end its Ray; %s", f"killed {names}" if names else "it is gone")

    def _new_token(self) -> Path:
        path = self._dir / "token"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_token_of_this_process())
        return path


class JoinedCluster:
    """A cluster that somebody else runs and secures; nothing of it is ever reaped or shut down here."""

    def __init__(self, address: str) -> None:
        """``address`` is ``host:port`` of the cluster's GCS, or ``auto``.

        Raises:
            ConfigError: it is an address of Ray Client.
        """
        if "://" in address:
            raise ConfigError(
                f"{address} is an address of Ray Client; run the coordinator on a node of the cluster and give the "
                "host:port that `ray start` printed, or auto"
            )
        self._address = address

    def start(self) -> None:
        """Connect to the cluster.

        Raises:
            UnreachableError: it does not answer.
        """
        logger.warning(
            "joining the Ray cluster at %s: whoever can reach its ports and holds its token can run code as its "
            "users, and what Ray carries between its nodes is pickled and not encrypted; plutino secures none of it",
            self._address,
        )
        self._check_reachable()
        os.environ.update(_ENVIRONMENT)
        # A process that has missed the cluster's head for this long is ended by Ray (default 60 s).
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
        try:
            # Other coordinators may be there too.
            _init_ray(address=self._address, namespace=f"plutino-{uuid.uuid4().hex}")
        except (ConnectionError, RuntimeError) as error:
            raise self._unreachable(error) from error

    def stop(self) -> None:
        """Disconnect; Ray then ends this coordinator's actors."""
        _shut_ray_down()

    def kill(self) -> None:
        """Nothing there is ours to kill."""

    def is_alive(self) -> bool:
        """Left to whoever runs the cluster; Ray reconnects by itself."""
        return True

    def record(self) -> None:
        """Nothing there is ours."""

    def _check_reachable(self) -> None:
        """Ray itself would try for as long as it may miss a cluster's head, and say nothing."""
        if self._address == "auto":
            return
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_WITHIN_S).close()
        except (OSError, ValueError, OverflowError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"cannot join the Ray cluster at {self._address}: {error}; check that `ray status` works on this "
            "machine with the same environment, or leave --ray-address out for an embedded Ray"
        )


def _init_ray(**arguments: Any) -> str:
    """Connect this process; returns the address of its node."""
    try:
        import ray
        from ray.job_config import JobConfig
    except ImportError as error:
        raise ConfigError(
            f"the engine on Ray cannot be used: {error}; install plutino[coordinator], or use --engine local"
        ) from error

    # At INFO and WARNING Ray tells of its own progress, and that it leaves SIGTERM to us.
    logging.getLogger("ray").setLevel(logging.ERROR)
    source_dir = str(Path(coordinator.__file__).resolve().parents[1])
    ray.init(
        # Workers import actors from the coordinator's own source. A runtime_env would do that too, but no prestarted
        # worker fits one: 3.5 s per actor instead of 0.3 s.
        job_config=JobConfig(code_search_path=[source_dir]),
        log_to_driver=False,
        configure_logging=False,
        **arguments,
    )
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _shut_ray_down() -> None:
    # A start that found no Ray has none to shut down.
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


@functools.cache
def _token_of_this_process() -> str:
    # Ray reads its token once per process: a later start with another one is refused by its own daemons.
    return secrets.token_hex(32)


def _short_tempdir() -> str:
    """The directory for temporary files, or /tmp where paths of sockets below the former would be too long."""
    usual = tempfile.gettempdir()
    longest = len(os.fsencode(usual)) + len(f"/{SESSION_PREFIX}12345678/r") + _SOCKET_SUFFIX_BYTES
    return usual if longest <= _SOCKET_PATH_BYTES else "/tmp"
