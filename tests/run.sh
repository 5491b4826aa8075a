#!/usr/bin/env bash
# Checks the code with ruff and runs the tests: bash tests/run.sh [--peers] [arguments of pytest]
# --peers: also compares with mmsegmentation and torchfcn, in an environment of its own, .venv-peers
set -euo pipefail
here=$(dirname "$0")
source "$here/../env_npu.sh"
modules=(numpy scipy PIL tqdm matplotlib torchvision pytest sklearn cv2 xdist onnx onnxruntime tensorboard markdown_it yaml
    ruff)

if [[ ${1-} == --peers ]]; then
    shift
    python=$here/../.venv-peers/bin/python
    if ! has_modules "$python" "${modules[@]}" mmseg; then
        "${PYTHON:-python3}" -m venv "$here/../.venv-peers"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements-peers.txt"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps torchfcn
    fi
else
    find_python "$here/requirements.txt" "${modules[@]}"
fi
"$python" -m ruff check "$here/.."
unset PYTHONDONTWRITEBYTECODE  # or each of the 200 processes compiles our modules
exec "$python" -m pytest --numprocesses 2 --dist worksteal "$here" "$@"
