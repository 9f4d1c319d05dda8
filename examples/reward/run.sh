#!/bin/sh
# Trains on two agents of this machine; state, logs and adapter in runs/reward.
exec "$(dirname "$0")/../on_this_machine.sh" submit runs/reward "$(dirname "$0")/job.yaml"
