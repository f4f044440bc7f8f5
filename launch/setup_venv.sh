#!/usr/bin/env bash
# Makes .venv and installs the package into it, once: bash launch/setup_venv.sh [EXTRA]
# EXTRA is an extra of setup.cfg, such as test. SR3_PYTHON names the Python to use (default: the newest found).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
constraints=launch/constraints.txt
python=.venv/bin/python

fail() {
    echo "$1" >&2
    exit 2
}

suitable() { # a candidate may be on the PATH and still not run, so it is run
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate found=""
    for candidate in ${SR3_PYTHON:+"$SR3_PYTHON"} python3.13 python3.12 python3.11 python3; do
        if suitable "$candidate"; then
            found=$candidate
            if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
                echo "$candidate"
                return
            fi
        fi
        if [[ -n ${SR3_PYTHON:-} ]]; then break; fi # the one that was asked for, or none
    done
    if [[ -n $found ]]; then
        fail "$found has no venv module: install it (on Debian and Ubuntu the package python3-venv), or name another Python in SR3_PYTHON."
    elif [[ -n ${SR3_PYTHON:-} ]]; then
        fail "SR3_PYTHON=$SR3_PYTHON is not a Python of version 3.11 or newer: name one that is, or unset SR3_PYTHON."
    else
        fail "No Python of version 3.11 or newer was found: install one, or name it in SR3_PYTHON."
    fi
}

version() {
    "$1" -c 'import platform; print(platform.python_version())'
}

# All that an install depends on. The path is in it because an editable install and its scripts point to it.
fingerprint() {
    "$python" - "$PWD" setup.cfg pyproject.toml "$constraints" <<'PY'
import hashlib, pathlib, sys
parts = [sys.version.encode(), sys.argv[1].encode(), *(pathlib.Path(name).read_bytes() for name in sys.argv[2:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

if [[ -e .venv/.sr3_making || ! -e .venv ]] || ! "$python" -c '' 2>/dev/null; then
    # There is none, its making was interrupted, or its Python is gone.
    if [[ -e .venv && ! -e .venv/.sr3_making && ! -e .venv/pyvenv.cfg ]]; then
        fail ".venv is there and is not a virtual environment: move it away."
    fi
    base=$(find_python)
    echo "Making .venv with Python $(version "$base")"
    rm -rf .venv
    mkdir .venv
    touch .venv/.sr3_making
    "$base" -m venv .venv
    rm .venv/.sr3_making
elif ! suitable "$python"; then
    fail ".venv has Python $(version "$python"), and 3.11 or newer is needed: delete .venv."
elif [[ -n ${SR3_PYTHON:-} ]]; then
    suitable "$SR3_PYTHON" || find_python # which says what is wrong
    if [[ $(version "$SR3_PYTHON") != $(version "$python") ]]; then
        fail ".venv has Python $(version "$python") and SR3_PYTHON is $(version "$SR3_PYTHON"): delete .venv, or unset SR3_PYTHON."
    fi
fi

wanted=$(fingerprint)
stamp=.venv/.sr3_installed${extra:+_$extra}
if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "Installed already in .venv"
    exit 0
fi

echo "Installing sr3_jax${extra:+[$extra]} into .venv (a minute or two, about 400 MB to download)"
started=$SECONDS
rm -f .venv/.sr3_installed* # an interrupted install leaves no stamp, so that the next run completes it
quiet=()
if [[ ! -t 1 ]]; then quiet=(--quiet); fi
"$python" -m pip install --disable-pip-version-check --no-input ${quiet[@]+"${quiet[@]}"} \
    --constraint "$constraints" --editable ".${extra:+[$extra]}"
echo "$wanted" | tee "$stamp" >.venv/.sr3_installed
echo "Installed in $((SECONDS - started)) s"
