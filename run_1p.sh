#!/usr/bin/env bash
# One card: bash run_1p.sh --data_path=DIR [--device_id=N] [--performance] [any flag of train.py]
# With AMP O1 unless on a CPU; --opt_level O0 undoes that. On an NPU it evaluates as the Ascend port: at 512, padded to
# 512x512, unless --scale, --val_scale or --pad_to is given.
# bash run_1p.sh --val --data_path=DIR [--work_dir=DIR] [any flag of evaluate.py] evaluates the latest checkpoint.
# Without --data_path: converts, trains, evaluates and predicts on a small data set that it draws.
set -euo pipefail
here=$(dirname "$0")
source "$here/env_npu.sh"
find_python "$here/requirements.txt" numpy scipy PIL tqdm matplotlib

if [[ " $* " == *" --val "* ]]; then
    if on_npu "$@"; then id=${ASCEND_DEVICE_ID:-0}; else id=0; fi
    evaluate_latest "$here" "output/$(value_of device_id "$id" "$@")/FCN" "$@"
fi

# Defaults come before "$@": argparse takes the last value of a flag.
if [[ " $*" =~ \ (--data[_-]path|--help|-h) ]]; then exec "$python" "$here/train.py" $(amp "$@") $(evaluation "$@") "$@"; fi

show() { printf '\n$ %s\n' "$*"; "$@"; }
sample=output/drawn_voc
voc=$sample/VOCdevkit/VOC2012
best=$(value_of work_dir $sample/FCN "$@")/ckpt/best.pth
id=$(value_of device_id '' "$@")
device=(--device "$(value_of device auto "$@")" ${id:+--device_id "$id"})
echo "No --data_path: trains on a small data set that is drawn here; a few minutes on two CPU cores."
show "$python" "$here/tools/draw_voc.py" $sample
show "$python" "$here/convert_voc_aug.py" $sample/VOCdevkit $sample/VOCdevkit/VOCaug
# Settings for small images, without ImageNet weights. With --resume, a second run resumes the first.
show "$python" "$here/train.py" --data_path $voc --train_split trainaug --backbone resnet50 --pretrained none \
    --scale 256 128 --crop_size 128 --batch_size 4 --max_iters 180 --log_interval 20 --eval_interval 60 \
    --checkpoint_interval 60 --work_dir $sample/FCN --resume auto "$@"
show "$python" "$here/evaluate.py" "$best" --data_path $voc "${device[@]}"
show "$python" "$here/predict.py" "$best" $voc/JPEGImages/drawn_val_000{0,1,2,3}.jpg \
    --save_dir $sample/labelled --overlay "${device[@]}"
