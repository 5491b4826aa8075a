#!/usr/bin/env bash
# Eight cards: bash run_8p.sh --data_path=DIR [--performance | --val] [--device=npu|cuda|cpu] [--device_list=0,1,..]
#     [--nnodes=N --node_rank=R --master_addr=IP --master_port=P --local_addr=IP] [any flag of train.py]
# With AMP O1 and, on NPU and CUDA, loss scale 128; --val scores the latest checkpoint. train.py starts torchrun.
set -euo pipefail
here=$(dirname "$0")
source "$here/find_python.sh"
find_python "$here/requirements.txt" numpy scipy PIL tqdm matplotlib torch

device=cuda
if has_npu; then device=npu; fi
trains=1
own_precision=
last=
for argument in "$@"; do
    case $last in --device) device=$argument ;; esac
    case $argument in
        --device=*) device=${argument#*=} ;;
        --val) trains= ;;
        --opt[_-]level* | --amp[_-]dtype* | --loss[_-]scale*) own_precision=1 ;;
    esac
    last=$argument
done
recipe=()
if [[ $trains ]]; then
    recipe=(--amp)
    case $own_precision$device in npu | cuda | gpu) recipe+=(--opt_level O1 --loss_scale 128) ;; esac
fi
exec "$python" "$here/train.py" --device "$device" --device_list 0,1,2,3,4,5,6,7 "${recipe[@]}" "$@"
