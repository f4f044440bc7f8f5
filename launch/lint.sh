#!/usr/bin/env bash
# Format, lint, types and shell scripts, with the tools of `bash launch/setup_venv.sh dev`: bash launch/lint.sh
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
[[ -x $bin/shellcheck ]] || {
    echo "lint.sh: the tools are not installed: run 'bash launch/setup_venv.sh dev' first." >&2
    exit 2
}

step() { # step NAME COMMAND...
    local started=$SECONDS name=$1
    shift
    echo "== $name"
    "$@"
    echo "   $((SECONDS - started)) s"
}

step "format" "$bin/python" -m ruff format --check .
step "lint" "$bin/python" -m ruff check .
step "types" "$bin/python" -m mypy sr3_jax
step "layers" "$bin/lint-imports" --no-cache
step "shell" "$bin/shellcheck" launch/*.sh launch/slurm.sbatch experiments/*.sh .ci/run
