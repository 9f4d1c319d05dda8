from __future__ import annotations

import os

import pytest

from edge_node.state_dir import NUM_KEPT_LOGS, StateDir, default_state_dir, host_id, log_tail, rotate_log, rotated
from plutino.errors import ConfigError


def test_state_dir_is_locked_against_a_second_agent_and_free_afterwards(tmp_path):
    with (
        StateDir(tmp_path / "d").locked(),
        pytest.raises(ConfigError, match=f"process {os.getpid()}"),
        StateDir(tmp_path / "d").locked(),
    ):
        pass
    with StateDir(tmp_path / "d").locked():
        pass


def test_state_dir_that_cannot_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="choose another --state-dir"), StateDir(tmp_path / "file/d").locked():
        pass


def test_agent_id_is_made_once(tmp_path):
    with StateDir(tmp_path).locked():
        assert StateDir(tmp_path).agent_id() == StateDir(tmp_path).agent_id()


def test_host_id_is_stable_and_tells_no_machine_id():
    assert host_id() == host_id()
    assert len(host_id()) == 16


def test_new_log_removes_the_oldest_but_none_in_use(tmp_path):
    state_dir = StateDir(tmp_path)
    with state_dir.locked():
        first = state_dir.new_log()
        first.touch()
        for _ in range(NUM_KEPT_LOGS + 3):
            state_dir.new_log(in_use={first}).touch()

        kept = {path.name for path in (tmp_path / "logs").iterdir()}
        assert first.name in kept
        assert "worker-2.log" not in kept
        assert f"worker-{NUM_KEPT_LOGS + 4}.log" in kept


def test_rotate_log_moves_aside_what_grew_and_the_writer_goes_on(tmp_path):
    log = tmp_path / "worker-1.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"0123456789")
        assert not rotate_log(log, max_bytes=10)
        writer.write(b"x")
        assert rotate_log(log, max_bytes=10)
        writer.write(b"after")

    assert rotated(log).read_bytes() == b"0123456789x"
    assert log.read_bytes() == b"after"
    assert log_tail(log, max_bytes=3) == "ter"


def test_default_state_dir_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    assert default_state_dir("pi-3") == tmp_path / "plutino/nodes/pi-3"
