from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edge_node.cli import main

HEAVY = ("torch", "transformers", "peft", "numpy", "ray", "pydantic", "psutil")


def modules_after(statement: str) -> set[str]:
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_agent_loads_nothing_heavy():
    assert modules_after("import edge_node.agent").isdisjoint(HEAVY)


def test_cli_help_does_not_even_load_grpc():
    loaded = modules_after("from edge_node.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")

    assert loaded.isdisjoint((*HEAVY, "grpc", "google", "asyncio"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--memory", "600"], "600MiB"),
        (["--memory", "1GiB", "--threads", "0"], "--threads 0"),
        (["--memory", "1GiB", "--name", "../x"], "device name"),
    ],
)
def test_cli_wrong_option_is_told_with_the_way_out(capsys, options, told):
    assert main(["run", "--coordinator", "127.0.0.1:1", *options]) == 2

    assert told in capsys.readouterr().err


def test_cli_coordinator_beyond_loopback_is_refused(capsys, tmp_path):
    options = ["--coordinator", "192.0.2.1:7400", "--memory", "1GiB", "--state-dir", str(tmp_path)]

    assert main(["run", *options]) == 9
    assert "not a loopback address" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0"])
def test_node_unknown_compute_device_is_refused(device, capsys):
    code = main(["run", "--coordinator", "127.0.0.1:1", "--memory", "1GiB", "--device", device])

    assert code == 2
    assert "it is cpu, cuda or cuda:N" in capsys.readouterr().err
