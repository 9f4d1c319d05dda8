"""Generate the Python code of all .proto files beside them: ``python -m protos.generate``, from anywhere.

With ``--check`` nothing is written: the code is generated into a temporary directory and compared with what is there.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
ROOT = PACKAGE_DIR.parent
GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(output_dir: Path) -> int:
    """Write the generated code below ``output_dir/protos``; gives protoc's exit status."""
    from grpc_tools import protoc

    # protoc looks its plugins up on PATH, which has this environment's scripts only when it is activated.
    mypy_plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy"
    return int(
        protoc.main(
            [
                "protoc",
                f"--plugin=protoc-gen-mypy={mypy_plugin}",
                # The root is the include path, so that generated files say ``from protos import ...``.
                f"--proto_path={ROOT}",
                f"--python_out={output_dir}",
                f"--grpc_python_out={output_dir}",
                f"--mypy_out=quiet:{output_dir}",
                *(str(path.relative_to(ROOT)) for path in sorted(PACKAGE_DIR.glob("*.proto"))),
            ]
        )
    )


def stale_files(fresh_dir: Path, committed_dir: Path) -> list[str]:
    """Names of generated files that are missing, differ, or belong to no .proto file any more."""
    fresh = _generated_in(fresh_dir)
    committed = _generated_in(committed_dir)
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def _generated_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in GENERATED_PATTERNS for path in directory.glob(pattern)}


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed code is stale")
    if not parser.parse_args(arguments).check:
        return generate(ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        status = generate(Path(scratch))
        stale = stale_files(Path(scratch) / PACKAGE_DIR.name, PACKAGE_DIR)
    if status == 0 and stale:
        tools = ", ".join(f"{name} {version(name)}" for name in ("grpcio-tools", "mypy-protobuf"))
        print(
            f"{len(stale)} generated file(s) do not match the .proto files under {tools}: {', '.join(stale)}. "
            "Run `make protos` with the versions that pyproject.toml names and commit the result",
            file=sys.stderr,
        )
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
