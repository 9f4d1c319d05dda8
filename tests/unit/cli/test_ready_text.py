"""What ``plutino up`` says, and to whom it says secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import serve
from coordinator.jobs.endpoints import Endpoints

TOKEN = "plutino1_abc"


def told(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool, hosts: tuple[str, ...] = ("127.0.0.1:3",)) -> str:
    monkeypatch.setattr(serve.sys.stdout, "isatty", lambda: is_terminal, raising=False)
    endpoints = Endpoints(
        devices_address="127.0.0.1:1",
        people_address="127.0.0.1:2",
        bulk_address="127.0.0.1:4",
        join_addresses=hosts,
        join_token=TOKEN if hosts else "",
    )
    return serve._ready_text(endpoints, Path("/state"), Path("/state/log"))


def test_up_prints_one_line_to_copy_on_a_terminal(monkeypatch):
    lines = told(monkeypatch, is_terminal=True).splitlines()

    assert f"  plutino node join {TOKEN}" in lines


def test_up_prints_no_token_where_its_output_may_end_in_a_log(monkeypatch):
    text = told(monkeypatch, is_terminal=False)

    assert TOKEN not in text and "plutino token create" in text


def test_up_on_loopback_says_how_other_machines_could_join(monkeypatch):
    assert "--listen 0.0.0.0" in told(monkeypatch, is_terminal=True)
    assert "--listen 0.0.0.0" not in told(monkeypatch, is_terminal=True, hosts=("192.0.2.1:3",))


def test_up_without_tls_says_so(monkeypatch):
    assert "without TLS" in told(monkeypatch, is_terminal=True, hosts=())


def test_endpoints_show_no_token():
    endpoints = Endpoints(devices_address="a", people_address="b", bulk_address="c", join_token=TOKEN)

    assert TOKEN not in repr(endpoints)
