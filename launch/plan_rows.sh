#!/usr/bin/env bash
# Computes the rows of the table of plans in docs/pods.md that are not there yet, one after another, at low priority.
# Needs the TPU's compiler, no TPU: pip install ".[tpu]". Stop it when you like; started again it goes on.
#
#   bash launch/plan_rows.sh                   # all that are missing: many hours on two cores
#   bash launch/plan_rows.sh --rows 1          # the next one
#   bash launch/plan_rows.sh --program train   # the training steps alone
#   bash launch/plan_rows.sh --quick           # with less effort of the compiler: half the time, memory above the truth
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec nice -n 10 env PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" launch/plan_doc.py --compute "$@"
