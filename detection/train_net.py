#!/usr/bin/env python
"""Train and test Faster or Mask R-CNN with detectron2, from a converted encoder.

convert-pretrain-to-detectron2.py converts the encoder. Options of the config follow as pairs:
MODEL.WEIGHTS FILE.pkl OUTPUT_DIR DIR SOLVER.BASE_LR 0.01. Metrics are written to
OUTPUT_DIR/results.json, as by every evaluation of this project.
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

if importlib.util.find_spec("detectron2") is None:
    print(
        "train_net.py: error: needs detectron2; detection/README.md says how to install it",
        file=sys.stderr,
    )
    sys.exit(2)

import moco as _first  # noqa: F401 (before torch: sets how its threads wait)

# isort: split
import c4
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm

from moco.cli import tool
from moco.encoder import pretrained
from moco.engine import run_folder
from moco.errors import InputError
from moco.evaluate import results
from moco.files import refuse_remote, write_json

GPUS = 8  # number of GPUs that the schedules are for


def main() -> int:
    """Run the script; return the exit status."""
    args = parser().parse_args()
    return tool.attempt("train_net.py", lambda: train(args))


def train(args: argparse.Namespace) -> None:
    """Train a detector, or only test one, on all GPUs of the command line."""
    cfg = configure(args)
    check_data(cfg)
    held = claim(cfg, args) if args.machine_rank == 0 else None
    try:
        launch(
            worker,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            args=(cfg, args),
        )
    finally:
        if held:
            held.release()


def claim(cfg: CfgNode, args: argparse.Namespace) -> run_folder.LockedFolder:
    """Lock OUTPUT_DIR for this run. If it holds another run, --eval-only uses a subfolder instead.

    Raises InputError if another run has written there, unless `--resume` continues it.
    """
    given = Path(cfg.OUTPUT_DIR)
    continues = args.resume and any(
        (given / name).exists() for name in ("last_checkpoint", c4.SOURCE)
    )
    candidates = run_folder.candidates(given, "detection") if args.eval_only else iter([given])
    held = run_folder.lock_first_free(
        given, candidates, continues and not args.eval_only, option="OUTPUT_DIR"
    )
    if held.folder != given:
        print(f"OUTPUT_DIR {given} holds another run; this one writes to {held.folder}")
        cfg.defrost()
        cfg.OUTPUT_DIR = str(held.folder)
        cfg.freeze()
    return held


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    p = default_argument_parser(epilog=__doc__)
    p.set_defaults(num_gpus=min(1, torch.cuda.device_count()))
    p.add_argument(
        "--auto-scale",
        action="store_true",
        help=f"on fewer than {GPUS} GPUs: keep the images per GPU; scale batch and learning rate "
        "down, and the number of iterations up",
    )
    return p


def configure(args: argparse.Namespace) -> CfgNode:
    """Return the configuration of the run. Raises InputError if it cannot run."""
    if args.num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}; "
            "0 runs on the CPU"
        )
    if args.num_machines > 1 and args.num_gpus == 0:
        raise InputError("--num-machines: several machines need GPUs")
    if not args.config_file:
        raise InputError(f"give --config-file FILE, one of those in {c4.CONFIGS}")
    processes = max(1, args.num_gpus * args.num_machines)
    cfg = c4.config(Path(args.config_file), args.opts, args.num_gpus * args.num_machines)
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        print("MODEL.WEIGHTS is empty: the backbone is randomly initialised")
    elif weights.startswith(("gs://", "s3://", "hdfs://")):
        refuse_remote(weights, "MODEL.WEIGHTS")
    elif "://" not in weights and not Path(weights).is_file():
        raise InputError(
            f"MODEL.WEIGHTS {weights}: no such file; "
            "convert a checkpoint with convert-pretrain-to-detectron2.py"
        )
    out = Path(cfg.OUTPUT_DIR)
    begun = c4.detector_origin(out)
    if (
        args.resume
        and (out / "last_checkpoint").exists()
        and begun.get("sha256") != c4.source(weights).get("sha256")
    ):
        other = begun.get("file", "other weights")
        raise InputError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}: the run there started from {other}; "
            "choose another folder"
        )
    if args.auto_scale and processes < GPUS:
        if cfg.SOLVER.IMS_PER_BATCH % GPUS:
            raise InputError(
                f"--auto-scale: SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is for {GPUS} "
                f"GPUs; give a multiple of {GPUS}"
            )
        cfg.SOLVER.REFERENCE_WORLD_SIZE = GPUS
        cfg = DefaultTrainer.auto_scale_workers(cfg, processes)
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH % processes:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: must be a multiple of the "
            f"{processes} GPUs"
        )
    print(
        f"{processes} process(es) on {cfg.MODEL.DEVICE}, batch {solver.IMS_PER_BATCH}, "
        f"lr {solver.BASE_LR:g}, warm-up {solver.WARMUP_ITERS}, steps {solver.STEPS}, "
        f"{solver.MAX_ITER} iterations, norm {cfg.MODEL.RESNETS.NORM}"
    )
    if not args.auto_scale and processes < GPUS:
        print(
            f"the schedules are made for {GPUS} GPUs; --auto-scale fits batch, learning rate and "
            f"iterations to {processes}"
        )
    cfg.freeze()
    return cfg


def check_data(cfg: CfgNode) -> None:
    """Raise InputError if a data set of the configuration is not in its folder."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        about = MetadataCatalog.get(name)
        if about.get("evaluator_type") == "pascal_voc":
            file = Path(about.dirname, "ImageSets", "Main", f"{about.split}.txt")
        elif about.get("evaluator_type") == "coco":
            file = Path(about.json_file)
        else:
            raise InputError(
                f"DATASETS: '{name}' is neither a VOC nor a COCO data set that detectron2 knows"
            )
        if not file.is_file():
            raise InputError(
                f"{name}: no {file}; set DETECTRON2_DATASETS to the folder that holds VOC2007, "
                "VOC2012 and coco"
            )


def worker(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Train or test in one process."""
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        Trainer.test(cfg, model)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if trainer.start_iter == 0:
        check_loaded(cfg, trainer.model)
        if comm.is_main_process():
            write_json(Path(cfg.OUTPUT_DIR, c4.SOURCE), c4.source(cfg.MODEL.WEIGHTS))
    trainer.train()


def check_loaded(cfg: CfgNode, model: torch.nn.Module) -> None:
    """Check that the model holds the converted backbone, bit by bit, and print that it does.

    Raises RuntimeError if it does not.
    """
    if not (found := c4.converted(cfg.MODEL.WEIGHTS)):
        return
    wrong = c4.differing_tensors(getattr(model, "module", model), found["model"])
    if wrong:
        raise RuntimeError(
            f"{cfg.MODEL.WEIGHTS}: {len(wrong)} tensors did not arrive in the model: "
            f"{pretrained.first_names(wrong)}"
        )
    if comm.is_main_process():
        print(
            f"{len(found['model'])} backbone tensors of {found['source']['file']} "
            "arrived bit by bit"
        )


class Trainer(DefaultTrainer):
    """A detectron2 trainer that chooses the evaluator of the data set and writes results.json."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Return the evaluator of a data set."""
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: torch.nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict:
        """Test the model; the main process writes results.json."""
        found = super().test(cfg, model, evaluators)
        if found and comm.is_main_process():
            write_results(cfg, found)
        return found


def write_results(cfg: CfgNode, found: dict[str, dict[str, float]]) -> None:
    """Write AP, AP50 and AP75 of boxes and masks, in [0, 1], to results.json in OUTPUT_DIR.

    Undefined metrics are left out.

    Args:
        cfg: configuration of the run.
        found: the evaluators' metrics in per cent, by task (`bbox`, `segm`) and name.
    """
    shapes = {"bbox": "box", "segm": "mask"}
    metrics = {
        f"{shape}_{name.lower()}": found[task][name] / 100
        for task, shape in shapes.items()
        for name in ("AP", "AP50", "AP75")
        if math.isfinite(found.get(task, {}).get(name, math.nan))
    }
    source = c4.source(cfg.MODEL.WEIGHTS)
    solver = cfg.SOLVER
    # thousands of iterations, converted to batches of 16 images
    iterations = solver.IMS_PER_BATCH * solver.MAX_ITER / 16_000
    results.write(
        Path(cfg.OUTPUT_DIR),
        {
            "method": source.get("method", "unknown"),
            "arch": source.get("arch", f"resnet{cfg.MODEL.RESNETS.DEPTH}"),
            "checkpoint": source.get("file", cfg.MODEL.WEIGHTS or None),
            "pretrain_epochs": source.get("epoch"),
            "protocol": f"detection {iterations:g}k",
            "dataset": cfg.DATASETS.TEST[0],
            "metrics": metrics,
            "settings": {
                "batch_size": solver.IMS_PER_BATCH,
                "lr": solver.BASE_LR,
                "iterations": solver.MAX_ITER,
                "norm": cfg.MODEL.RESNETS.NORM,
                "seed": cfg.SEED,
            },
        },
    )
    shown = "  ".join(
        f"{name.replace('_ap', ' AP')} {100 * value:.3f}" for name, value in metrics.items()
    )
    print(f"* {shown or 'no AP: the model detects nothing yet'}")


if __name__ == "__main__":
    sys.exit(main())
