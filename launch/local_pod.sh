#!/usr/bin/env bash
# A pod on one machine, N processes of K simulated CPU devices each: bash launch/local_pod.sh N K COMMAND...
# What it does, its options and its exit codes are at the top of launch/local_pod.py.
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/local_pod.py" "$@"
