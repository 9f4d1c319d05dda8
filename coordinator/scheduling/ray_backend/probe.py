"""Does Ray work here? Starts one in a folder of its own and ends it; a doctor runs this as a process of its own."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Print a line of JSON after the import, and one after a start and a stop."""
    started_s = time.perf_counter()
    import ray

    from coordinator.scheduling.ray_backend.cluster import EmbeddedCluster

    print(json.dumps({"import": {"version": ray.__version__, "seconds": time.perf_counter() - started_s}}), flush=True)
    with tempfile.TemporaryDirectory(prefix="plutino-doctor-") as folder:
        cluster = EmbeddedCluster(Path(folder))
        started_s = time.perf_counter()
        cluster.start()
        try:
            print(json.dumps({"start": {"seconds": time.perf_counter() - started_s}}), flush=True)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
