#!/bin/sh
# Trains on two agents of this machine; state, logs and adapter in runs/regression.
exec "$(dirname "$0")/../on_this_machine.sh" submit runs/regression "$(dirname "$0")/job.yaml"
