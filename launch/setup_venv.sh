#!/usr/bin/env bash
# Creates .venv and installs the package into it, unless that was done before: bash launch/setup_venv.sh [EXTRA]
# EXTRA is an extra of setup.cfg, such as test. SR3_PYTHON: the Python interpreter (default: the newest one found).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
constraints=launch/constraints.txt
python=.venv/bin/python

fail() {
    echo "$1" >&2
    exit 2
}

suitable() { # run the candidate: being on the PATH is not enough
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
        if [[ -n ${SR3_PYTHON:-} ]]; then break; fi # only the requested one
    done
    if [[ -n $found ]]; then
        fail "$found has no venv module: install it (Debian and Ubuntu: package python3-venv), or set SR3_PYTHON to another Python."
    elif [[ -n ${SR3_PYTHON:-} ]]; then
        fail "SR3_PYTHON=$SR3_PYTHON is not Python >= 3.11: set it to one that is, or unset it."
    else
        fail "Python >= 3.11 was not found: install it, or set SR3_PYTHON to its path."
    fi
}

version() {
    "$1" -c 'import platform; print(platform.python_version())'
}

# Everything that an installation depends on, including the path, which an editable install refers to.
fingerprint() {
    "$python" - "$PWD" setup.cfg pyproject.toml "$constraints" <<'PY'
import hashlib, pathlib, sys
parts = [sys.version.encode(), sys.argv[1].encode(), *(pathlib.Path(name).read_bytes() for name in sys.argv[2:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

if [[ -e .venv/.sr3_making || ! -e .venv ]] || ! "$python" -c '' 2>/dev/null; then
    # Missing, only partly created, or without a working Python.
    if [[ -e .venv && ! -e .venv/.sr3_making && ! -e .venv/pyvenv.cfg ]]; then
        fail ".venv exists and is not a virtual environment: move it away."
    fi
    base=$(find_python)
    echo "Creating .venv with Python $(version "$base")"
    rm -rf .venv
    mkdir .venv
    touch .venv/.sr3_making
    "$base" -m venv .venv
    rm .venv/.sr3_making
elif ! suitable "$python"; then
    fail ".venv has Python $(version "$python"), but >= 3.11 is required: delete .venv."
elif [[ -n ${SR3_PYTHON:-} ]]; then
    suitable "$SR3_PYTHON" || find_python # prints the error
    if [[ $(version "$SR3_PYTHON") != $(version "$python") ]]; then
        fail ".venv has Python $(version "$python"), but SR3_PYTHON is $(version "$SR3_PYTHON"): delete .venv, or unset SR3_PYTHON."
    fi
fi

wanted=$(fingerprint)
stamp=.venv/.sr3_installed${extra:+_$extra}
if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo ".venv is up to date"
    exit 0
fi

echo "Installing sr3_jax${extra:+[$extra]} into .venv (a minute or two, about 400 MB to download)"
started=$SECONDS
rm -f .venv/.sr3_installed* # without a stamp, the next run repeats an interrupted installation
quiet=()
if [[ ! -t 1 ]]; then quiet=(--quiet); fi
"$python" -m pip install --disable-pip-version-check --no-input ${quiet[@]+"${quiet[@]}"} \
    --constraint "$constraints" --editable ".${extra:+[$extra]}"
echo "$wanted" | tee "$stamp" >.venv/.sr3_installed
echo "Installed in $((SECONDS - started)) s"
