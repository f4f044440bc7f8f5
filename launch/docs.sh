#!/usr/bin/env bash
# Builds the documentation into site/: bash launch/docs.sh [serve]
# With `serve`, serves it at http://127.0.0.1:8000 instead and rebuilds on changes. Nothing is downloaded at build time.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-build}" in
    build | serve) ;;
    *)
        echo "docs.sh takes no argument or 'serve', got: $1" >&2
        exit 2
        ;;
esac
if [[ ! -x .venv/bin/mkdocs ]]; then
    bash launch/setup_venv.sh docs
fi

# The pages need no accelerator; the two variables silence notices of JAX and mkdocs-material.
export JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1
if [[ ${1:-build} == serve ]]; then
    exec .venv/bin/mkdocs serve --livereload
fi
.venv/bin/mkdocs build --strict # which counts warnings only if it prints them: no --quiet
echo "Built site/index.html"
