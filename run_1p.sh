#!/usr/bin/env bash
# One card: bash run_1p.sh --data_path=DIR [--device_id=N] [--performance] [any flag of train.py]
# With AMP O1 unless on a CPU; --opt_level O0 undoes that.
# Without --data_path it shows the whole job on a small data set that it draws: convert, train, evaluate, predict.
set -euo pipefail
here=$(dirname "$0")
source "$here/find_python.sh"
find_python "$here/requirements.txt" numpy scipy PIL tqdm matplotlib torch

for argument in "$@"; do
    case $argument in
        -h | --help) exec "$python" "$here/train.py" --help ;;
        --data_path* | --data-path*) exec "$python" "$here/train.py" $(precision "$(flag device auto "$@")" "$(flag opt_level '' "$@")") "$@" ;;
    esac
done

show() { printf '\n$ %s\n' "$*"; "$@"; }
sample=output/drawn_voc
devkit=$sample/VOCdevkit
best=$(flag work_dir $sample/FCN "$@")/ckpt/best.pth
device=(--device "$(flag device auto "$@")" --device_id "$(flag device_id 0 "$@")")  # for all commands
echo "No --data_path: the job on a small drawn data set, in a few minutes on two CPU cores."
show "$python" "$here/tests/drawn_voc.py" $sample
show "$python" "$here/convert_voc_aug.py" $devkit $devkit/VOCaug
# Settings for small pictures and no ImageNet weights; --resume, so that a second run goes on from what is there.
show "$python" "$here/train.py" --data_path $devkit/VOC2012 --backbone resnet50 --pretrained none --scale 256 128 \
    --crop_size 128 --batch_size 4 --max_iters 180 --log_interval 20 --eval_interval 60 --checkpoint_interval 60 \
    --work_dir $sample/FCN --resume auto "$@"
show "$python" "$here/evaluate.py" "$best" --data_path $devkit/VOC2012 "${device[@]}"
show "$python" "$here/predict.py" "$best" $devkit/VOC2012/JPEGImages/drawn_val_000{0,1,2,3}.jpg \
    --save_dir $sample/labelled --overlay "${device[@]}"
