#!/bin/sh
# Trains on two agents of this machine; state, logs and adapter in runs/classification.
exec "$(dirname "$0")/../on_this_machine.sh" submit runs/classification "$(dirname "$0")/job.yaml"
