#!/usr/bin/env bash
# README's tables and pictures of speed, parity and preview, all made in one go from the demo's images:
#
#     scripts/figures.sh                      # tables are printed, pictures go to .github/
#     DEMO_DIR=/data/demo scripts/figures.sh  # with the demo's files elsewhere
#
# Nothing else should run meanwhile. It takes about 3 minutes on 2 cores.
set -euo pipefail
demo=$(realpath -m "${DEMO_DIR:-$(dirname "${BASH_SOURCE[0]}")/../demo}")
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"

if [[ ! -d $demo/images ]]; then
    "$python" scripts/make_demo_images.py "$demo/images" --classes 4 --train-per-class 150 --val-per-class 50
fi
for split in train val; do
    if [[ ! -f $demo/$split.lmdb ]]; then
        "$python" scripts/convert.py "$demo/images/$split" "$demo/$split.lmdb"
    fi
done

# "$@" is shown as a reader would type it, with paths relative to the checkout.
show() { printf '\n$ dali-lmdb %s\n' "${*//"$demo"/demo}"; "$python" -m dali_lmdb "$@"; }

show compare "$demo/train.lmdb" --images "$demo/images/train" --plot .github/compare.png
show preview "$demo/train.lmdb" -o .github/preview.png --backend both --count 4 --size 72 --color-jitter 0.4 --random-erase 0.25
show parity "$demo/train.lmdb"
show info "$demo/train.lmdb"
