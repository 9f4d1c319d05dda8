#!/usr/bin/env bash
# Is what pyproject.toml promises true? Resolves the oldest and the newest set of packages that its ranges allow, for each
# Python and processor, from the registry's metadata alone; with a Python as argument it also installs the oldest set
# beside the tree and runs the tests with it:
#
#   deploy/lower_bounds.sh                 # a minute; needs uv (pip install uv)
#   deploy/lower_bounds.sh python3.10      # a quarter of an hour and 6 GB: torch's oldest wheel carries CUDA
set -euo pipefail
cd "$(dirname "$0")/.."

ranges=(pyproject.toml --extra coordinator --extra device)
quiet=(--quiet --no-header --no-annotate)
shown='^(torch|transformers|peft|ray|grpcio|protobuf|pydantic|numpy|typer)=='

for python in 3.10 3.11 3.12 3.13 3.14; do
    for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_28; do
        for resolution in lowest-direct highest; do
            # A package without a wheel for this Python and processor must be an error, not a compiler's work on a board.
            found=$(uv pip compile "${ranges[@]}" "${quiet[@]}" --only-binary :all: --python-version "$python" \
                --python-platform "$platform" --resolution "$resolution")
            echo "$python $platform $resolution: $(grep -E "$shown" <<<"$found" | tr '\n' ' ')"
        done
    done
done

[ $# -eq 0 ] && exit
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$1" -m venv "$environment"
uv pip compile "${ranges[@]}" --extra dev "${quiet[@]}" --resolution lowest-direct --python "$1" -o "$environment/oldest.txt"
uv pip install --quiet --python "$environment/bin/python" -r "$environment/oldest.txt"
PYTHONPATH=$PWD "$environment/bin/python" -m pytest -q -p no:cacheprovider tests
