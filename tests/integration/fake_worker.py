"""A worker without torch: speaks the agent's protocol and does what its assignment's ``act`` says.

Standard library only, so that it starts in milliseconds. ``--start`` breaks its start in a given way.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--yields", action="store_true")
    parser.add_argument("--start", default="well")
    parser.add_argument("--baseline-bytes", type=int, default=20 * MIB)
    options = parser.parse_args()

    if options.start == "import-error":
        raise ImportError("No module named 'torch'")
    with os.fdopen(options.events_fd, "w", buffering=1) as events:
        if options.start == "babble":
            events.write("no json\n")
        hardware = {"kind": "cpu", "name": "fake", "machine": "", "capability": "", "arithmetic": "fake"}
        ready = {
            "baseline_bytes": options.baseline_bytes,
            "dtypes": ["fp32"],
            "versions": {"torch": "0"},
            "hardware": {**hardware, "memory_bytes": 0, "idle_accelerators": []},
        }
        events.write(json.dumps({"ready": ready}) + "\n")
        held = []
        for line in sys.stdin:
            match json.loads(line):
                case {"profile": {"die": True}}:
                    os.abort()
                case {"profile": {"config_json": _, **request}}:
                    print("measured", flush=True)
                    result = {"lacked_company": False}
                    if request.get("beside"):
                        events.write(json.dumps({"reached": 0}) + "\n")
                        result["lacked_company"] = not json.loads(sys.stdin.readline())["go_on"]["is_whole"]
                    timings = dict.fromkeys(("forward_s", "embedding_s", "head_forward_s", "head_backward_s"), 0.01)
                    result["timings"] = {**timings, "backward_s": 0.02}
                    events.write(json.dumps({"profile": result}) + "\n")
                case {"profile": request}:
                    events.write(json.dumps({"profile": {"timings": {"asked": request}}}) + "\n")
                case {"assign": {"act": "exit", "exit_code": code}}:
                    sys.exit(code)
                case {"assign": {"act": "fail"}}:
                    said = {"reason": "2 of 3 tensors missing", "out_of_memory": False, "error": "ModelError"}
                    events.write(json.dumps({"exiting": said}) + "\n")
                    sys.exit(3)
                case {"assign": {"act": "hold", "stage_key": key, "keeps_stage_s": seconds}}:
                    idle = {"stage_key": key, "keeps_stage_s": seconds, "reason": "the job succeeded"}
                    events.write(json.dumps({"idle": idle}) + "\n")
                case {"assign": {"act": "go-on", "left_bytes": left_bytes}}:
                    said = {"waits_s": 60.0, "left_bytes": left_bytes, "reason": "the plan is over"}
                    events.write(json.dumps({"going_on": said}) + "\n")
                case {"assign": {"act": "eat", "bytes": count}}:
                    held.append(b"x" * count)
                case {"assign": {"act": "ignore-sigterm"}}:
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    print("ignoring", flush=True)


if __name__ == "__main__":
    main()
