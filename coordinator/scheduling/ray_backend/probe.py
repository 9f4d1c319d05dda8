"""Does Ray work here? Starts one in a folder of its own and ends it; a doctor runs this as a process of its own."""

from __future__ import annotations

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from coordinator.scheduling.ray_backend.cluster import EmbeddedCluster


def main() -> None:
    """Print a line of JSON if Ray is installed, and one after it has started; it is stopped in any case."""
    print(json.dumps({"installed": {"version": version("ray")}}), flush=True)
    with tempfile.TemporaryDirectory(prefix="plutino-doctor-") as folder:
        cluster = EmbeddedCluster(Path(folder))
        started_s = time.perf_counter()
        # Imports Ray, after it has set the environment that the import reads.
        cluster.start()
        try:
            print(json.dumps({"start": {"seconds": time.perf_counter() - started_s}}), flush=True)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
