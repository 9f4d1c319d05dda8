#!/bin/sh
# Runs one of the examples on two agents of this machine: on_this_machine.sh submit|llm2llm OUT FILE.YAML...
# Several files are run one after the other.
# The coordinator's state and all logs lie in OUT; everything that was started ends with this script.
set -eu
command=$1 out=$2
shift 2
mkdir -p "$out"
plutino up --state-dir "$out/state" --engine local --listen 127.0.0.1:0 --api 127.0.0.1:0 >"$out/up.log" 2>&1 &
pids=$!
trap 'kill $pids 2>/dev/null || true; wait' EXIT INT TERM
waited=0
until token=$(plutino token create --uses 2 --state-dir "$out/state" 2>/dev/null); do
    waited=$((waited + 1))
    [ "$waited" -lt 60 ] || { cat "$out/up.log"; exit 1; }
    sleep 0.5
done
for name in one two; do
    # The line that joins a device, with a name and a folder of its own.
    $token --name "$name" --memory 1GiB --state-dir "$out/$name" >"$out/$name.log" 2>&1 &
    pids="$pids $!"
done
for file in "$@"; do
    plutino "$command" "$file" --state-dir "$out/state"
done
