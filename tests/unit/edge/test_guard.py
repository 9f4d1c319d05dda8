from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from edge_node.guard import STACK_SLACK_BYTES, data_segment_limit, read_usage
from plutino.errors import OutOfMemoryError

MIB = 1 << 20


def test_read_usage_of_this_process_agrees_with_the_kernel():
    usage = read_usage(os.getpid())

    assert usage is not None
    assert MIB < usage.rss_bytes <= usage.peak_rss_bytes
    assert usage.peak_rss_bytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 8 * MIB
    assert usage.cpu_seconds > 0


def test_read_usage_of_an_ended_process_is_none_before_and_after_it_is_reaped():
    process = subprocess.Popen([sys.executable, "-S", "-E", "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()  # ends with the process, which is then a zombie
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert read_usage(process.pid) is None
    process.communicate(timeout=10)
    assert read_usage(process.pid) is None


def test_data_segment_limit_grants_what_the_budget_has_left():
    limit_bytes = data_segment_limit(budget_bytes=600 * MIB, rss_bytes=350 * MIB, data_bytes=900 * MIB)

    assert limit_bytes == 900 * MIB + 250 * MIB + STACK_SLACK_BYTES


def test_data_segment_limit_of_a_spent_budget_is_refused_with_the_numbers():
    with pytest.raises(OutOfMemoryError, match=r"350 MiB before any job, its memory budget is 300 MiB"):
        data_segment_limit(budget_bytes=300 * MIB, rss_bytes=350 * MIB, data_bytes=0)


def test_limit_data_segment_makes_an_allocation_beyond_the_budget_fail():
    program = """
import json, os
from edge_node.guard import limit_data_segment, read_usage
rss = read_usage(os.getpid()).rss_bytes
limit_data_segment(rss + (100 << 20), rss)
small = bytearray(90 << 20)
try:
    bytearray(200 << 20)
    beyond = "granted"
except MemoryError:
    beyond = "refused"
print(json.dumps({"small": len(small), "beyond": beyond}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)

    assert json.loads(ended.stdout) == {"small": 90 * MIB, "beyond": "refused"}
