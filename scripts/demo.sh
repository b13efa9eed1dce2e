#!/usr/bin/env bash
# The whole workflow in a few minutes: makes a small image set, converts it, trains a ResNet-18 on it with two
# ranks on the available devices, and compares the loaders' speed.
#
#     scripts/demo.sh                      # everything goes to demo/ in the checkout
#     DEMO_DIR=/data/demo scripts/demo.sh  # ... or elsewhere
#
# A second run reuses the images and stores, and trains from scratch. The environment is .venv in the checkout,
# created on the first run (see venv.sh).
set -euo pipefail
demo=$(realpath -m "${DEMO_DIR:-$(dirname "${BASH_SOURCE[0]}")/../demo}")
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

step() { printf '\n== %s\n' "$*"; }

cd "$root"
mkdir -p "$demo"

step "Images: $demo/images"
if [[ ! -d $demo/images ]]; then
    "$python" scripts/make_demo_images.py "$demo/images" --classes 4 --train-per-class 150 --val-per-class 50
fi

for split in train val; do
    step "Store: $demo/$split.lmdb"
    if [[ ! -f $demo/$split.lmdb ]]; then
        "$python" scripts/convert.py "$demo/images/$split" "$demo/$split.lmdb"
    fi
done

# Two ranks, each on its own GPU, or both on the CPU. NCCL refuses two ranks on one GPU.
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=2
if ((gpus == 1)); then ranks=1; fi

rm -rf "$demo/run"  # the trainer refuses to overwrite a checkpoint
step "Training: $ranks rank(s), $gpus GPU(s)"
"$python" -m dali_lmdb.train --world-size "$ranks" --train "$demo/train.lmdb" --val "$demo/val.lmdb" \
    --arch resnet18 --size 96 --epochs 5 --batch-size 32 --lr 0.02 --workers 1 --output "$demo/run"

step "Loaders compared"
"$python" -m dali_lmdb.compare "$demo/train.lmdb" --images "$demo/images/train"
