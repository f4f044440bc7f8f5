#!/usr/bin/env bash
# Compute the missing rows of the table in docs/pods.md, at low priority. Requires libtpu (pip install 'jax[tpu]') but
# no TPU. It can be interrupted and restarted.
#
#   bash launch/plan_rows.sh                   # all missing rows: many hours on two cores
#   bash launch/plan_rows.sh --rows 1          # the next row
#   bash launch/plan_rows.sh --program train   # only training steps
#   bash launch/plan_rows.sh --quick           # compile with less effort: half the time, overestimates memory
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec nice -n 10 env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" launch/plan_doc.py --compute "$@"
