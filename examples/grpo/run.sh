#!/bin/sh
# Trains a weak start, then goes on from rewards, on two agents of this machine; all of it lies in runs/grpo.
here=$(dirname "$0")
exec "$here/../on_this_machine.sh" submit runs/grpo "$here/start.yaml" "$here/job.yaml"
