# Sourced by run_1p.sh, run_8p.sh and tests/run.sh. Sets CANN's environment where there is an NPU, and finds a Python.

export TORCH_DEVICE_BACKEND_AUTOLOAD=0  # otherwise a broken torch_npu breaks `import torch`

has_npu() { compgen -G '/dev/davinci[0-9]*' >/dev/null || command -v npu-smi >/dev/null; }

# Sets the environment that torch_npu needs. A variable that the caller has set keeps its value.
set_up_cann() {
    local folder -  # the dash: options set in here end with the function
    set +eu  # CANN's script fails under `set -eu`
    # torch_npu cannot be imported without CANN's libraries. Root installs CANN in /usr/local (the newer folder comes
    # first here), a user in $HOME.
    for folder in /usr/local/Ascend/{cann,ascend-toolkit} "$HOME"/Ascend/{cann,ascend-toolkit}; do
        if [[ -z ${ASCEND_TOOLKIT_HOME:-} && -f $folder/set_env.sh ]]; then source "$folder/set_env.sh"; break; fi
    done
    # Two threads with balanced loads send the operators to the device. Ascend recommends 2, the default is 1 (Ascend
    # Extension for PyTorch, environment variables). It may take more memory; 1 avoids that.
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
    # Seconds that cards wait for each other when they first communicate, to which CANN adds 20. Its default of 120 is also
    # its minimum; it is short where cards read from a slow disk or compile operators. It belongs below HCCL_EXEC_TIMEOUT.
    # HCCL's other variables have good defaults, also HCCL_WHITELIST_DISABLE: 1 (CANN 9.1, environment variables).
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600}
}
if has_npu; then set_up_cann; fi

die() { echo "$0: $*" >&2; exit 1; }

has_modules() {  # PYTHON MODULE...: false if one is not installed, or PyTorch is too old; $missing says which
    missing=$("$1" -c '
import sys
from importlib.metadata import version
from importlib.util import find_spec
lacks = [name for name in (*sys.argv[1:], "torch") if find_spec(name) is None]
if not lacks and tuple(map(int, version("torch").split(".")[:2])) < (2, 6):
    lacks = ["torch 2.6 or later"]
if lacks:
    sys.exit(lacks[0])' "${@:2}" 2>&1)
}

# Sets $python to $PYTHON (python3) if that has PyTorch and the modules, otherwise to the Python of .venv, and installs
# them there if need be.
find_python() {  # REQUIREMENTS MODULE...
    local requirements=$1 own=${PYTHON:-python3} venv missing lacks
    venv=$(dirname "${BASH_SOURCE[0]}")/.venv
    command -v "$own" >/dev/null || die "there is no $own; set PYTHON to a Python of version 3.10 or later"
    python=$own
    if has_modules "$python" "${@:2}"; then return; fi
    lacks="$own lacks $missing"
    python=$venv/bin/python
    if has_modules "$python" "${@:2}"; then return; fi
    # torch, torch_npu and CANN must match, and pip would pick the wrong torch.
    if has_npu; then
        die "this machine has an NPU driver, so nothing is installed; $lacks:" \
            "install requirements-npu.txt, or what belongs to your CANN (docs/ascend.md)"
    fi
    echo "$0: $lacks; installing $requirements into $venv (once, some minutes)" >&2
    "$own" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
        die "pip, whose error is above, could not install $requirements (PyTorch takes up to 6 GB of disk);" \
            "fix that and run the same command again"
    has_modules "$python" "${@:2}" || die "$venv still lacks $missing; delete it and try again"
}

value_of() {  # FLAG DEFAULT ARGUMENT...: prints the value that argparse would give --FLAG, which is the last one
    local flag=__$1 value=$2
    while (($#)); do
        case ${1//-/_} in "$flag") value=${2-} ;; "$flag="*) value=${1#*=} ;; esac
        shift
    done
    printf '%s\n' "$value"
}

on_npu() {  # ARGUMENT...: true if train.py and evaluate.py will run on an NPU
    case $(value_of device auto "$@") in npu) ;; auto) has_npu ;; *) false ;; esac
}

# Prints the evaluation of the Ascend port if train.py will run on an NPU, whose kernels it compiles for each shape anew.
# A scale or padding of the user replaces it.
evaluation() {  # ARGUMENT...
    on_npu "$@" || return 0
    [[ -n $(value_of scale '' "$@")$(value_of val_scale '' "$@")$(value_of pad_to '' "$@") ]] ||
        echo --val_scale 512 512 --pad_to 512
}

# Becomes evaluate.py, for the latest checkpoint in --work_dir. evaluate.py has neither that flag nor --val.
evaluate_latest() {  # FOLDER-OF-EVALUATE.PY DEFAULT-WORK-DIR ARGUMENT...
    local here=$1 work_dir flags=()
    work_dir=$(value_of work_dir "$2" "${@:3}")
    [[ -n $work_dir ]] || die "--work_dir takes a value, not ''"
    shift 2
    while (($#)); do
        case $1 in
            --val | --work[_-]dir=*) ;;
            --work[_-]dir) shift $(($# > 1)) ;;
            *) flags+=("$1") ;;
        esac
        shift
    done
    exec "$python" "$here/evaluate.py" "$work_dir/ckpt/latest.pth" "${flags[@]}"
}

amp() {  # ARGUMENT...: prints --amp unless train.py will run on a CPU without --opt_level (which needs --amp)
    case $(value_of device auto "$@")$(value_of opt_level '' "$@") in
        cpu) return 0 ;;
        auto) has_npu || "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || return 0 ;;
    esac
    echo --amp
}
