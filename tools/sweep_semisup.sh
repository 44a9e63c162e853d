#!/usr/bin/env bash
# Fine-tune a checkpoint on few labels with SynCo's protocol, then print the table of the best settings.
# The protocol: 1 % of the labels for 60 epochs, 10 % for 30 (100 % for 90), batch 1024, the
# classifier's learning rate .5, and five learning rates of the backbone.
#
#   tools/sweep_semisup.sh CHECKPOINT DIR OUT [options of main_semisup.py ...]
#   PERCENTS="1 10"  EPOCHS="60"  RATES="0.01 0.02 0.05 0.1 0.005"  PYTHON=python    environment variables that change these
#
# Options win over the protocol and over these variables: --epochs 5, --lr-backbone 0.02 (no sweep),
# --train-percent 1, --lr-classifier 0.3, --batch-size 64. The sweep may be stopped and started again:
# it skips finished runs and continues the others from their checkpoints. The best setting is chosen
# on a tenth of the labelled images, held out; --val-from-train changes this fraction.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: tools/sweep_semisup.sh CHECKPOINT DIR OUT [options of main_semisup.py ...]" >&2
    exit 2
fi
checkpoint=$1 data=$2 out=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

# given options that replace the sweep's own settings
percents=${PERCENTS:-1 10} all_epochs=${EPOCHS:-} rates=${RATES:-0.01 0.02 0.05 0.1 0.005}
option=
for word in "$@"; do
    case $word in
        --*=*) option=${word%%=*} value=${word#*=} ;;
        -*) option=$word && continue ;; # its value follows
        *) value=$word ;;
    esac
    case ${option//_/-} in
        --train-percent) percents=$value ;;
        --epochs) all_epochs=$value ;;
        --lr-backbone) rates=$value ;;
        --pretrained | --save-dir | --output | --tag | --resume)
            echo "tools/sweep_semisup.sh: error: $option is set by the sweep itself; leave it out" >&2
            exit 2
            ;;
    esac
    option=
done

for percent in $percents; do
    case $percent in 1) published=60 ;; 10) published=30 ;; *) published=90 ;; esac
    for epochs in ${all_epochs:-$published}; do
        for rate in $rates; do
            run="$out/${percent}percent_${epochs}epochs_lr$rate"
            if [ -f "$run/results.json" ]; then
                echo "$run: done before"
                continue
            fi
            "$python" "$here/main_semisup.py" --protocol synco --weights finetune --val-from-train 0.1 --batch-size 1024 \
                --train-percent "$percent" --epochs "$epochs" --lr-backbone "$rate" --lr-classifier 0.5 "$@" \
                --pretrained "$checkpoint" --save-dir "$run" --resume auto "$data"
        done
    done
done
"$python" "$here/tools/collect.py" "$out" --out "$out" --force
