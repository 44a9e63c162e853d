"""Write the results of an evaluation to results.json."""

import time
from pathlib import Path
from typing import Any

from moco import distributed
from moco.config import Evaluation, Probing, flat
from moco.engine import tracking
from moco.engine.log import STARTED, format_duration, write_options
from moco.files import write_json
from moco.messages import print_rank0


def write_results(
    config: Probing | Evaluation,
    protocol: str,
    found: dict[str, float],
    seconds: float | None = None,
) -> None:
    """Write results.json to the run folder on rank 0, and args.yaml if it is not there.

    The results also go to the tracker of `--track`.

    Args:
        config: the settings of the evaluation.
        protocol: the name of the evaluation, such as linear or knn.
        found: metrics by name, fractions in [0, 1].
        seconds: how long the evaluation took; by default the time since this process started.
    """
    if distributed.rank() != 0:
        return
    images, encoder, settings = config.input, config.encoder, flat(config)
    dataset = config.run.data if images.dataset == "imagenet" else images.dataset
    dataset = config.other_test.eval_data or dataset
    if images.class_list:
        dataset += f" ({Path(images.class_list).name})"
    folder = Path(config.run.save_dir)
    if not (folder / "args.yaml").exists():
        write_options(config)
    tracking.begin(config)
    tracking.results({f"eval/{name}": value for name, value in found.items()})
    write(
        folder,
        {
            "method": encoder.encoder_method,
            "arch": config.network.arch,
            "checkpoint": encoder.pretrained,
            "pretrain_epochs": encoder.pretrain_epochs,
            "protocol": protocol,
            "dataset": dataset,
            "metrics": found,
            "settings": {name: settings[name] for name in _SETTINGS if name in settings},
        },
        seconds,
    )


def write(folder: Path, results: dict[str, Any], seconds: float | None = None) -> None:
    """Write `results` to results.json in `folder`. Print its path and the time taken.

    Args:
        folder: the run folder.
        results: plain values by key.
        seconds: how long the evaluation took; by default the time since this process started.
    """
    write_json(folder / "results.json", results)
    took = time.perf_counter() - STARTED if seconds is None else seconds
    print_rank0(
        f"results in {folder / 'results.json'}; the evaluation took {format_duration(took)}"
    )


# settings that can differ between runs of one protocol
_SETTINGS = (
    "features temperature image_size test_resize mean std stem norm_eps epochs batch_size optimizer"
    " lr lr_backbone lr_classifier learning_rate_scaling cos wd weights train_percent"
    " subset_file ft_proj exif white val_from_train label_smoothing drop_path amp"
    " imsize crop_queries center_crop multiscale scales pooling normalize_scales ap"  # of retrieval
    " queries episodes clusters repeats"  # of few-shot classification and clustering
    " seed iterations norm"  # of detectors
).split()
