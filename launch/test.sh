#!/usr/bin/env bash
# Everything that must hold before a change is merged: format, lint, types, tests. Arguments go to pytest:
#   bash launch/test.sh                                      all of it
#   bash launch/test.sh tests/test_images.py -k bicubic      the lint, and these tests
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup_venv.sh test
bash launch/lint.sh
echo "== tests ($SECONDS s so far)"
# One worker a core of a small machine. pytest's own summary, with its time, is the last line.
exec .venv/bin/python -m pytest -n 2 --durations=10 "$@" </dev/null
