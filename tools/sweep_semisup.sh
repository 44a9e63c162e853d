#!/usr/bin/env bash
# Fine-tune a checkpoint at every rate and number of epochs of SynCo's semi-supervised protocol, then print the table of the best.
#
#   tools/sweep_semisup.sh CHECKPOINT DIR OUT [options of main_semisup.py ...]
#   PERCENTS="1 10"  EPOCHS="30 60"  RATES="0.01 0.02 0.05 0.1 0.005"  PYTHON=python    to try others
#
# May be stopped and started again: what is done is skipped, what was begun goes on from its checkpoint. The best setting is
# chosen on a tenth of the labelled images, held out; pass another --val-from-train to change the share.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: tools/sweep_semisup.sh CHECKPOINT DIR OUT [options of main_semisup.py ...]" >&2
    exit 2
fi
checkpoint=$1 data=$2 out=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

for percent in ${PERCENTS:-1 10}; do
    for epochs in ${EPOCHS:-30 60}; do
        for rate in ${RATES:-0.01 0.02 0.05 0.1 0.005}; do
            run="$out/${percent}percent_${epochs}epochs_lr$rate"
            if [ -f "$run/results.json" ]; then
                echo "$run: done before"
                continue
            fi
            "$python" "$here/main_semisup.py" --val-from-train 0.1 "$@" --pretrained "$checkpoint" --save-dir "$run" \
                --train-percent "$percent" --epochs "$epochs" --lr-backbone "$rate" --lr-classifier "$rate" --resume auto "$data"
        done
    done
done
"$python" "$here/tools/collect.py" --force "$out"
