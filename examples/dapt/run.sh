#!/bin/sh
# Trains on two agents of this machine; state, logs and adapter in runs/dapt.
exec "$(dirname "$0")/../on_this_machine.sh" submit runs/dapt "$(dirname "$0")/job.yaml"
