"""Takes the command line of ``plutino-node``, writes it where its token says, and stays until it is ended."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    arguments = sys.argv[2:]
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    report = Path(Path(values["--token-file"]).read_text())
    draft = report.with_suffix(".draft")
    told = {
        **values,
        "pid": os.getpid(),
        "rays_secrets": [k for k in os.environ if "RAY_" in k],
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    draft.write_text(json.dumps(told))
    draft.rename(report)
    signal.pause()
