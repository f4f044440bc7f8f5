#!/usr/bin/env bash
# Simulates a pod on one machine, N processes of K simulated CPU devices each: bash launch/local_pod.sh N K COMMAND...
# Behavior, options and exit codes: see launch/local_pod.py.
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/local_pod.py" "$@"
