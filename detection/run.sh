#!/usr/bin/env bash
# Convert a checkpoint, fine-tune a detector from it, and test the detector. OUT/results.json holds AP, AP50 and AP75 of boxes
# (and masks).
#
#   detection/run.sh CHECKPOINT voc|coco OUT [options of train_net.py ...]
#   CONFIG=detection/configs/coco_R_50_C4_1x_moco.yaml    another schedule or lr (default: MoCo's, VOC 24k or COCO 2x)
#   GPUS=8  PYTHON=python                                 number of GPUs, and the Python to use
#
# DETECTRON2_DATASETS names the folder of the data sets. The script may be stopped and started again; it continues from the last
# checkpoint.
set -euo pipefail

usage() {
    echo "usage: detection/run.sh CHECKPOINT voc|coco OUT [options of train_net.py ...]" >&2
    exit 2
}
[ $# -ge 3 ] || usage
checkpoint=$1 data=$2 out=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
case $data in
    voc) config=${CONFIG:-$here/configs/pascal_voc_R_50_C4_24k_moco.yaml} ;;
    coco) config=${CONFIG:-$here/configs/coco_R_50_C4_2x_moco.yaml} ;;
    *) usage ;;
esac

"$python" "$here/convert-pretrain-to-detectron2.py" "$checkpoint" "$out/weights.pkl" --check
"$python" "$here/train_net.py" --config-file "$config" ${GPUS:+--num-gpus "$GPUS"} --resume "$@" \
    MODEL.WEIGHTS "$out/weights.pkl" OUTPUT_DIR "$out"
