#!/usr/bin/env python
"""Cluster the features of images by k-means, and compare the clusters with the classes.

  python tools/cluster.py DIR --pretrained CKPT
  python tools/cluster.py FILE

DIR is a data folder. The images of its val/ are clustered (--split train: those of train/). FILE is
a file of tools/embed.py. There, the class of an image is the first folder in its name, after a
leading train/, val/, validation/ or test/. Without --pretrained, the encoder is randomly
initialised, which is the baseline to compare with.

There are as many clusters as classes, unless --clusters is given. The result is the mean over
--repeats runs of k-means with different seeds: normalized mutual information (NMI), adjusted Rand
index (ARI), and the accuracy if each cluster is matched with one class.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco import config, sections_eval
from moco.cli import entry
from moco.cli.parser import Parser
from moco.cli.types import Device
from moco.errors import InputError
from moco.evaluate import feature_tables
from moco.messages import counted, print_rank0

METRICS = {"nmi": "NMI", "ari": "ARI", "cluster_accuracy": "matched accuracy"}


@dataclass(frozen=True)
class Config(config.Evaluation):
    """The settings of this tool."""

    clustering: sections_eval.Clustering = sections_eval.Clustering()

    @property
    def compared(self) -> sections_eval.Compared:
        """Return the settings of the features to compare."""
        return self.clustering


def parser() -> Parser:
    """Return the parser of the options."""
    p = Parser(__doc__, Config())
    stored = "features come from the file of tools/embed.py; leave it out"
    names = "pretrained arch features host_features dump_features load_features dataset download "
    names += "class_list data_name batch_size workers exif white image_size test_resize stem "
    names += "norm_eps mean std amp compile split multiprocessing_distributed nproc_per_node"
    p.has_effect(names, lambda args: not table_of(args.data), stored)
    one = "features of both splits are saved; leave it out, and save them with main_knn.py"
    p.has_effect("dump_features", lambda args: False, one)
    return p


def table_of(data: str | None) -> Path | None:
    """Return the path of the file of tools/embed.py that `data` names; None for a folder."""
    path = Path(data or "")
    return path if path.suffix.lower() in feature_tables.WRITERS and path.is_file() else None


def complete(c: Config) -> Config:
    """Return the completed settings. Raises InputError if the data or the checkpoint do not fit."""
    from moco.evaluate import inputs

    if table := table_of(c.run.data):
        *_, about = feature_tables.read(table)
        arch, method = (str(about.get(name) or "unknown") for name in ("arch", "method"))
        facts = {"image_size": about.get("image_size"), "pretrained": about.get("checkpoint")}
        facts |= {"pretrain_epochs": about.get("epoch"), "test_resize": about.get("test_resize")}
        return config.replaced(c, arch=arch, encoder_method=method, split=None, **facts)
    inputs.check_head(c)
    c = inputs.complete_features(c, multi_label=False)
    return config.replaced(c, features=c.clustering.features or "backbone")


def worker(c: Config, device: Device) -> None:
    """Cluster the features, print the metrics and write results.json."""
    from moco import distributed
    from moco.engine import features
    from moco.evaluate import clusters, inputs, results

    split = c.clustering.split
    if table := table_of(c.run.data):
        x, labels, count = read_table(table)
    else:
        found, classes = inputs.frozen_split(c, device, split)
        x, labels = (features.gather_in_order(part).cpu().numpy() for part in found)
        count = len(classes)
    if distributed.rank() != 0:
        return
    count = c.clustering.clusters or count
    if len(x) > clusters.LARGE:
        print_rank0(f"{len(x)} images are clustered in mini-batches")
    seeds = range(c.run.seed, c.run.seed + c.clustering.repeats)
    runs = [clusters.measure(x, labels, count, seed) for seed in seeds]
    metrics = {}
    for name in METRICS:
        values = np.array([run[name] for run in runs])
        metrics |= {name: float(values.mean()), f"{name}_std": float(values.std())}
    shown = (f"{title} {100 * metrics[name]:.2f}" for name, title in METRICS.items())
    print_rank0(f"* {counted(len(x), 'image')}, {counted(count, 'cluster')}: {'  '.join(shown)}")
    protocol = "clusters of train" if split == "train" else "clusters"
    results.write_results(config.replaced(c, clusters=count), protocol, metrics)


def read_table(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the normalized features, the labels, and the number of classes of a file.

    Raises InputError if the file cannot be read, or if the names have no folders.
    """
    from moco.data import splits

    names, rows, _ = feature_tables.read(path)
    folders = [list(Path(name).parts[:-1]) for name in names]
    leading = {name for names in splits.FOLDERS.values() for name in names}
    if all(parts and parts[0] in leading for parts in folders):
        folders = [parts[1:] for parts in folders]
    if not all(folders):
        name = names[folders.index([])]
        raise InputError(
            f"{path}: the name '{name}' has no folder, and the first folder is the class; write "
            "the features of a folder of class folders"
        )
    classes, labels = np.unique([parts[0] for parts in folders], return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"{path}: its images are of one class; give images of two classes or more")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise InputError(f"{path}: its features contain NaN or infinity; the encoder diverged")
    return rows / np.maximum(norms, 1e-12), labels, len(classes)


if __name__ == "__main__":
    entry.main(parser(), complete, worker)
