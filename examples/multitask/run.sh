#!/bin/sh
# Trains on two agents of this machine; state, logs and adapter in runs/multitask.
exec "$(dirname "$0")/../on_this_machine.sh" submit runs/multitask "$(dirname "$0")/job.yaml"
