"""Write results.json."""

import time
from pathlib import Path

from moco import distributed
from moco.distributed import print_rank0
from moco.engine.log import STARTED, clock, write_options
from moco.files import write_json


def write_results(
    config: Config, protocol: str, found: dict[str, float], seconds: float | None = None
) -> None:
    """Write results.json to the run folder and print where it is, on rank 0.

    `found` has metrics as fractions in [0, 1]. `seconds` is how long the evaluation took; by
    default, the time since this process started.
    """
    if distributed.rank() != 0:
        return
    some = f" ({Path(config.input.class_list).name})" if getattr(config, "class_list", None) else ""
    results = {
        "method": config.encoder.encoder_method,
        "arch": config.network.arch,
        "checkpoint": config.encoder.pretrained,
        "pretrain_epochs": config.encoder.pretrain_epochs,
        "protocol": protocol,
        "dataset": (config.run.data if config.input.dataset == "imagenet" else config.input.dataset) + some,
        "metrics": found,
        "settings": {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)},
    }
    folder = Path(config.run.save_dir)
    if hasattr(config, "script") and not (folder / "args.yaml").exists():  # nothing was trained
        write_options(config)
    write_json(folder / "results.json", results)
    took = time.perf_counter() - STARTED if seconds is None else seconds
    print_rank0(f"results in {folder / 'results.json'}; the evaluation took {clock(took)}")


# what tells apart the runs of one protocol
_SETTINGS = (
    "features temperature image_size mean std stem"
    " epochs batch_size optimizer lr lr_backbone lr_classifier learning_rate_scaling cos wd weights train_percent"
    " subset_file ft_proj val_from_train amp seed"
    " iterations norm"  # of detectors
).split()
