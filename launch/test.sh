#!/usr/bin/env bash
# All checks that a change must pass: format, lint, types, docs, notebook, tests. Arguments go to pytest:
#   bash launch/test.sh                                        everything
#   bash launch/test.sh tests/test_image_ops.py -k bicubic     lint, and these tests
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup_venv.sh dev
bash launch/lint.sh
if (($# == 0)); then
    echo "== docs ($SECONDS s so far)"
    bash launch/docs.sh
    echo "== notebook ($SECONDS s so far)"
    JAX_PLATFORMS=cpu .venv/bin/jupyter execute docs/quickstart.ipynb
fi
echo "== tests ($SECONDS s so far)"
# Two workers, for small machines. pytest's summary, with its time, is the last line.
exec .venv/bin/python -m pytest -n 2 --durations=10 "$@" </dev/null
