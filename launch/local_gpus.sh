#!/usr/bin/env bash
# Starts one process for each of N GPUs of this machine: bash launch/local_gpus.sh [--dry-run] [--logs DIR] N|all COMMAND...
# Without it, `sr3 train` uses all GPUs from one process. Behavior, options and exit codes: see launch/local_pod.py.
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/local_pod.py" --gpus "$@"
