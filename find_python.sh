# Sourced by run_1p.sh, run_8p.sh and tests/run.sh; `flag` and `precision` read a command line. After `find_python REQUIREMENTS MODULE...`, $python can import the
# modules: it is the Python at hand if that can, else the one of .venv, made and filled here if need be.

export TORCH_DEVICE_BACKEND_AUTOLOAD=0  # or a broken torch_npu breaks `import torch`

has_modules() {  # PYTHON MODULE...
    local probe=$1 module
    shift
    command -v "$probe" >/dev/null || return 1
    for module in "$@"; do
        missing=$module  # for the message, should it fail
        "$probe" -c "import $module" >/dev/null 2>&1 || return 1
    done
    missing="torch 2.6 or later"
    "$probe" -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)' 2>/dev/null
}

has_npu() { compgen -G '/dev/davinci[0-9]*' >/dev/null || command -v npu-smi >/dev/null; }

# What torch_npu needs around it on an NPU. What the caller has set stays.
set_up_cann() {
    local folder
    # CANN's libraries, without which torch_npu cannot be imported: where root installs CANN (the newer folder first),
    # and where a user does. Its script is not made for `set -eu`.
    for folder in /usr/local/Ascend/{cann,ascend-toolkit} "$HOME"/Ascend/{cann,ascend-toolkit}; do
        if [ -z "${ASCEND_TOOLKIT_HOME:-}" ] && [ -f "$folder/set_env.sh" ]; then
            set +eu
            source "$folder/set_env.sh"
            set -eu
            break
        fi
    done
    # Two threads with evened loads hand the operators to the device; Ascend recommends this 2, the default is 1 (Ascend
    # Extension for PyTorch, environment variables). It may take more memory: 1 takes that back.
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
    # Seconds that cards wait for each other when they first communicate; CANN's 120 is its least, and short where they
    # start from a slow disk or compile operators. HCCL's other variables are right by default, today also
    # HCCL_WHITELIST_DISABLE, which older instructions set to 1 (CANN, environment variables).
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600}
}

flag() {  # NAME DEFAULT ARGUMENT...: prints the value of --NAME VALUE, --NAME=VALUE or --na-me; the last one counts
    local name=$1 value=$2 last='' argument start
    shift 2
    for argument in "$@"; do
        start=${argument%%=*}
        case $argument in --*=*) if [[ ${start//-/_} == "__$name" ]]; then value=${argument#*=}; fi ;; esac
        if [[ ${last//-/_} == "__$name" ]]; then value=$argument; fi
        last=$argument
    done
    printf '%s\n' "$value"
}

# Prints --amp where the device that train.py will take is no CPU: O1, with loss scale 128 on NPU, dynamic on CUDA. On a
# CPU, too, where there is an --opt_level, which needs it.
precision() {  # DEVICE OPT_LEVEL
    if [[ $2 ]]; then echo --amp; return; fi
    case $1 in
        cpu) ;;
        auto) if has_npu || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then echo --amp; fi ;;
        *) echo --amp ;;
    esac
}

find_python() {  # REQUIREMENTS MODULE...
    local requirements=$1 venv
    if has_npu; then set_up_cann; fi
    venv=$(dirname "${BASH_SOURCE[0]}")/.venv
    shift
    for python in "${PYTHON:-python3}" "$venv/bin/python"; do
        if has_modules "$python" "$@"; then return; fi
    done
    # torch, torch_npu and CANN must match: what pip would pick here is the wrong torch.
    if has_npu; then
        has_modules "${PYTHON:-python3}" "$@" || true  # for $missing
        echo "$0: this machine has an NPU driver, so nothing is installed; ${PYTHON:-python3} lacks $missing:" \
             "install requirements-npu.txt, or what belongs to your CANN (docs/ascend.md)" >&2
        exit 1
    fi
    echo "$0: ${PYTHON:-python3} lacks $missing; installing $requirements into $venv (once, some minutes)" >&2
    "${PYTHON:-python3}" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" || {
        echo "$0: pip, whose error is above, could not install $requirements (PyTorch takes up to 6 GB of disk);" \
             "mend that and run the same command again" >&2
        exit 1
    }
    has_modules "$python" "$@" || { echo "$0: $venv still lacks $missing; delete it and try again" >&2; exit 1; }
}
