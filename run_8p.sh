#!/usr/bin/env bash
# Eight cards: bash run_8p.sh --data_path=DIR [--performance] [--device=npu|cuda|cpu] [--device_list=0,1,..]
#     [--nnodes=N --node_rank=R --master_addr=IP --master_port=P --local_addr=IP] [any flag of train.py]
# With AMP O1 unless on a CPU; --opt_level O0 undoes that.
# bash run_8p.sh --val --data_path=DIR [--work_dir=DIR] [any flag of evaluate.py] scores the latest checkpoint.
set -euo pipefail
here=$(dirname "$0")
source "$here/find_python.sh"
find_python "$here/requirements.txt" numpy scipy PIL tqdm matplotlib torch

device=cuda
if has_npu; then device=npu; fi
device=$(flag device $device "$@")
cards=$(flag device_list 0,1,2,3,4,5,6,7 "$@")
devices=(--device "$device" --device_list "$cards")
work_dir=$(flag work_dir "output/$cards/FCN" "$@")
evaluates=
others=()  # without those that are not evaluate.py's
last=
for argument in "$@"; do
    case $last$argument in
        --work[_-]dir* | --work[_-]dir) ;;
        *--val) evaluates=1 ;;
        *) others+=("$argument") ;;
    esac
    case $argument in --work[_-]dir) last=$argument ;; *) last= ;; esac
done
if [[ $evaluates ]]; then
    exec "$python" "$here/evaluate.py" "$work_dir/ckpt/latest.pth" "${devices[@]}" "${others[@]}"
fi
exec "$python" "$here/train.py" "${devices[@]}" $(precision "$device" "$(flag opt_level '' "$@")") "$@"
