from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from plutino.client import Client
from plutino.endpoint import ENDPOINT_FILE, default_state_dir, read_endpoint
from plutino.errors import InfeasiblePlanError, SecurityError, StoreError, UnknownJobError, UnreachableError
from plutino.job.spec import JobSpec, parse_spec
from tests.unit.client.fake_coordinator import FakeCoordinator
from tests.unit.client.job_history import history, state


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator()
    fake.address = fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def client(coordinator: FakeCoordinator) -> Iterator[Client]:
    with Client(coordinator.address) as client:
        yield client


def spec() -> JobSpec:
    return parse_spec({"model": "m", "data": {"train": "t.jsonl"}}, base_dir=Path("/x"))


def test_submit_sends_the_spec_with_a_key_of_its_own(client, coordinator):
    assert client.submit(spec()) == "fake-1"
    client.submit(spec())

    sent = coordinator.submitted
    assert JobSpec.model_validate_json(sent[0].spec_json) == spec()
    assert sent[0].idempotency_key and sent[0].idempotency_key != sent[1].idempotency_key


def test_submit_given_a_key_sends_it(client, coordinator):
    client.submit(spec(), idempotency_key="once")

    assert coordinator.submitted[0].idempotency_key == "once"


def test_call_the_coordinators_error_comes_back_as_its_class(client, coordinator):
    coordinator.error = InfeasiblePlanError("needs 5 GiB, 3 GiB offered; lower batch_size")

    with pytest.raises(InfeasiblePlanError, match="needs 5 GiB, 3 GiB offered; lower batch_size"):
        client.plan(spec())


def test_jobs_unset_values_are_none(client):
    (job,) = client.jobs()

    assert (job.job_id, job.ended_at_s, job.adapter_dir, job.has_ended) == ("fake-1", None, None, False)


def test_watch_yields_every_event_and_ends_with_the_job(client, coordinator):
    coordinator.events, coordinator.state = history(), "succeeded"

    seen = list(client.watch("fake"))

    assert [one.event for one in seen] == history()
    assert [one.number for one in seen] == list(range(1, len(seen) + 1))


def test_watch_broken_stream_goes_on_behind_the_last_event(client, coordinator):
    coordinator.events, coordinator.state, coordinator.break_after = history(), "succeeded", 3

    seen = list(client.watch("fake-1"))

    assert [one.event for one in seen] == history()
    assert coordinator.watched_after[:2] == [0, 3]


def test_watch_coordinator_restarted_goes_on_with_the_new_one(coordinator):
    coordinator.events, coordinator.hold = [state("running")], threading.Event()
    successor = FakeCoordinator()
    successor.events, successor.state = [state("running"), state("succeeded")], "succeeded"
    with Client(coordinator.address) as client:
        watching = client.watch("fake-1")
        first = next(watching)

        coordinator.stop()
        successor.start(coordinator.address)
        rest = list(watching)
    successor.stop()

    assert [first.event, *(one.event for one in rest)] == successor.events


def test_watch_coordinator_that_stays_away_is_told_with_the_way_back(coordinator):
    coordinator.events, coordinator.hold = [state("running")], threading.Event()
    with Client(coordinator.address) as client:
        watching = client.watch("fake-1", reconnect_s=0.1)
        next(watching)
        coordinator.stop()

        with pytest.raises(UnreachableError, match=r"plutino up.*plutino watch fake-1"):
            next(watching)


def test_watch_unknown_job_names_the_latest(client):
    with pytest.raises(UnknownJobError, match="no job 'other'; the latest: fake-1"):
        next(client.watch("other"))


def test_call_nobody_listens_tells_how_to_start(coordinator):
    coordinator.stop()
    with Client(coordinator.address) as client, pytest.raises(UnreachableError, match="plutino up"):
        client.jobs()


def test_client_address_beyond_loopback_is_refused():
    with pytest.raises(SecurityError, match="not a loopback address"):
        Client("192.0.2.1:7421")


def test_local_finds_the_address_in_the_state_folder(client, coordinator, tmp_path):
    (tmp_path / ENDPOINT_FILE).write_text(json.dumps({"people_address": coordinator.address}))

    with Client.local(tmp_path) as found:
        assert found.jobs() == client.jobs()


def test_read_endpoint_no_coordinator_ever_tells_how_to_start(tmp_path):
    with pytest.raises(UnreachableError, match=r"no coordinator has run .*plutino up"):
        read_endpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_read_endpoint_damaged_file_is_told(tmp_path, text):
    (tmp_path / ENDPOINT_FILE).write_text(text)

    with pytest.raises(StoreError, match="restart the coordinator"):
        read_endpoint(tmp_path)


def test_default_state_dir_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    assert default_state_dir() == tmp_path / "plutino"
