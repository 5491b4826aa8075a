#!/usr/bin/env bash
# One card: bash run_1p.sh --data_path=DIR [--device_id=N] [--performance] [any flag of train.py]
# Without --data_path it shows the whole job on a small data set that it draws: convert, train, evaluate.
set -euo pipefail
here=$(dirname "$0")
source "$here/find_python.sh"
find_python "$here/requirements.txt" numpy scipy PIL tqdm matplotlib torch

sample=output/drawn_voc
work_dir=$sample/FCN
device=()  # for evaluate.py, too
last=
for argument in "$@"; do
    case $argument in
        --data_path* | --data-path* | -h | --help) exec "$python" "$here/train.py" "$@" ;;
        --device=* | --device_id=* | --device-id=*) device+=("$argument") ;;
        --work_dir=* | --work-dir=*) work_dir=${argument#*=} ;;
    esac
    case $last in
        --work_dir | --work-dir) work_dir=$argument ;;
        --device | --device_id | --device-id) device+=("$last" "$argument") ;;
    esac
    last=$argument
done

show() { printf '\n$ %s\n' "$*"; "$@"; }
devkit=$sample/VOCdevkit
echo "No --data_path: the job on a small drawn data set, in a few minutes on two CPU cores."
show "$python" "$here/tests/drawn_voc.py" $sample
show "$python" "$here/convert_voc_aug.py" $devkit $devkit/VOCaug
# Settings for small pictures and no ImageNet weights; --resume, so that a second run goes on from what is there.
show "$python" "$here/train.py" --data_path $devkit/VOC2012 --backbone resnet50 --pretrained none --scale 256 128 \
    --crop_size 128 --batch_size 4 --max_iters 180 --log_interval 20 --eval_interval 60 --checkpoint_interval 60 \
    --work_dir "$work_dir" --resume auto "$@"
show "$python" "$here/evaluate.py" "$work_dir/ckpt/best.pth" --data_path $devkit/VOC2012 "${device[@]}"
