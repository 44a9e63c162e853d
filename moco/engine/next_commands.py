"""Suggest commands to run after pre-training, which can be pasted into the same shell."""

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

from moco.config import Pretraining, flat
from moco.data import registry
from moco.data.sources import find
from moco.errors import InputError


def commands(config: Pretraining, saved: Path) -> list[str]:
    """Return the shell commands for k-NN, a linear probe and the report.

    If the run has a k-NN monitor, the k-NN command has the same settings. If there are no images to
    test on, a command that writes features to a file takes the place of k-NN and the probe. If the
    training images are lost, only the command for the report is left.

    Args:
        config: the settings of the pre-training.
        saved: its last checkpoint.
    """
    home = Path(sys.argv[0]).parent
    if not (home / "main_knn.py").exists():  # another program runs the training
        home = Path(os.path.relpath(Path(__file__).parent.parent.parent))
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    settings = flat(config)
    given = [config.run.data, "--pretrained", saved]
    if config.input.dataset not in ("imagenet", "photos"):
        given += ["--dataset", config.input.dataset]
    for name in ("class_list", "data_name"):
        if (value := settings[name]) is not None:
            given += [f"--{name.replace('_', '-')}", value]
    if config.launch.multiprocessing_distributed:
        given.append("--multiprocessing-distributed")
        given += (
            ["--nproc-per-node", config.launch.nproc_per_node]
            if config.launch.nproc_per_node
            else []
        )
    monitor = (
        {"--k": "knn_k", "--temperature": "knn_t", "--features": "knn_features"}
        if config.monitor.knn_every
        else {}
    )
    knn = [word for option, name in monitor.items() for word in (option, settings[name])]
    found = []
    with contextlib.suppress(InputError):  # the training is done, and needs no images any more
        data = config.input.dataset, config.run.data, config.listed.file_list
        if registry.has_test_images(*data):
            found = [[home / "main_knn.py", *given, *knn], [home / "main_lincls.py", *given]]
        elif (embed := home / "tools" / "embed.py").exists() and not config.listed.file_list:
            find(config.run.data, ("train",), labels=False)
            found = [[embed, *given[:3], "--out", Path(config.run.save_dir) / "features.npz"]]
    found.append([home / "tools" / "report.py", config.run.save_dir])
    return [shlex.join(map(str, [python, *words])) for words in found]
