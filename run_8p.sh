#!/usr/bin/env bash
# Eight cards: bash run_8p.sh --data_path=DIR [--performance] [--device=npu|cuda|cpu] [--device_list=0,1,..]
#     [--nnodes=N --node_rank=R --master_addr=IP --master_port=P --local_addr=IP] [any flag of train.py]
# With AMP O1 unless on a CPU; --opt_level O0 undoes that. On an NPU it evaluates as the Ascend port: at 512, padded to
# 512x512, unless --scale, --val_scale or --pad_to is given.
# bash run_8p.sh --val --data_path=DIR [--work_dir=DIR] [any flag of evaluate.py] evaluates the latest checkpoint as
# its training did.
set -euo pipefail
here=$(dirname "$0")
source "$here/env_npu.sh"
find_python "$here/requirements.txt" numpy scipy PIL tqdm matplotlib

[[ -z $(value_of device_id '' "$@") ]] ||
    die "takes --device_list=0,1,.., a process for each, not --device_id; one card: bash run_1p.sh --device_id=N"
set -- --device "$(if has_npu; then echo npu; else echo cuda; fi)" --device_list 0,1,2,3,4,5,6,7 "$@"
if [[ " $* " != *" --val "* ]]; then exec "$python" "$here/train.py" $(amp "$@") $(evaluation "$@") "$@"; fi

evaluate_latest "$here" "output/$(value_of device_list '' "$@")/FCN" "$@"
