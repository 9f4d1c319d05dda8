#!/bin/sh
# Runs the loop on two agents of this machine; state, logs, rows and adapter in runs/llm2llm.
exec "$(dirname "$0")/../on_this_machine.sh" llm2llm runs/llm2llm "$(dirname "$0")/loop.yaml"
