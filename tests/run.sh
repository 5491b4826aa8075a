#!/usr/bin/env bash
# Checks the code's form by ruff, and runs the tests: bash tests/run.sh [--peers] [arguments of pytest]
# --peers: those that compare with mmsegmentation and torchfcn too, in an environment of their own, .venv-peers
set -euo pipefail
here=$(dirname "$0")
source "$here/../find_python.sh"
modules=(numpy scipy PIL tqdm matplotlib torch torchvision pytest sklearn xdist onnx onnxruntime tensorboard markdown_it
         ruff)

run_tests() {  # ARGUMENTS
    "$python" -m ruff check "$here/.."
    exec "$python" -m pytest --numprocesses 2 --dist worksteal "$here" "$@"
}

if [[ ${1:-} == --peers ]]; then
    shift
    python=$here/../.venv-peers/bin/python
    if ! has_modules "$python" "${modules[@]}" mmseg; then
        "${PYTHON:-python3}" -m venv "$here/../.venv-peers"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements-peers.txt"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps torchfcn
    fi
    run_tests "$@"
fi
find_python "$here/requirements.txt" "${modules[@]}"
run_tests "$@"
