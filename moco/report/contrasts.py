"""Measure the negatives of pre-training checkpoints on a sample of images."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco import devices
from moco.augment import recipes
from moco.builder.base import Method
from moco.cli.rebuild import rebuild
from moco.config import Pretraining, flat, replaced
from moco.data import registry
from moco.data.images import Images
from moco.engine import precision
from moco.errors import InputError
from moco.evaluate import negatives
from moco.evaluate.negatives import Measured
from moco.launch import processes
from moco.loss.synthetic import Synthetic
from moco.messages import counted, print_rank0
from moco.report import pictures, samples
from moco.report.options import Options
from moco.report.plots import printable
from moco.report.runs import unique_names
from moco.report.samples import Sample
from moco.sections_negatives import Schedule

# SynCo's synthetic negatives and the size of its queue (arXiv 2410.02401); the page shows them for
# methods that have none
PUBLISHED = Synthetic(n_hard=1024, counts=(256, 256, 256, 64, 64, 64))
_PUBLISHED_QUEUE = 65_536
_QUEUES = ("moco_k", "queue")  # the settings with the size of the queue


@dataclass(frozen=True)
class Contrast:
    """The negatives of one checkpoint.

    Attributes:
        path: the checkpoint.
        run: the name of its run on the page.
        epoch: number of epochs that it was trained for.
        config: the settings of its run.
        n_hard: number of hardest negatives, from which the synthetic ones are made.
        schedule: the run's synthetic negatives; None if it has none, and `PUBLISHED` is shown.
        queue: number of entries in the run's queue; None if it has none.
        negatives: number of negatives of a query in training: entries of the queue, or features of
            the batch; 0 if there are neither.
        average: whether keys come from a moving average of the encoder.
        measured: the measurements.
    """

    path: Path
    run: str
    epoch: float
    config: Pretraining
    n_hard: int
    schedule: Schedule | None
    queue: int | None
    negatives: int
    average: bool
    measured: Measured


def measure(paths: list[Path], options: Options) -> tuple[list[Contrast], Sample]:
    """Return the negatives of each checkpoint, in the order of runs and epochs, and the sample.

    The bank has the keys of the same images for all checkpoints, and the queries are some of these
    images, in another view.

    Raises InputError if a checkpoint cannot be used, or if the images cannot be found.
    """
    unique = {path.resolve(): path for path in paths}
    folders = sorted({path.parent for path in unique})
    names = dict(zip(folders, unique_names(folders), strict=True))
    # read all checkpoints first, so that mistakes are found before features are computed
    order = []
    for resolved, path in unique.items():
        found = rebuild(path)
        if found.method.query_and_key is None:
            raise InputError(
                f"{path}: {found.config.run.method} has no negatives; give a checkpoint of "
                "another method"
            )
        order.append((names[resolved.parent], found.epoch, path))
    sample, queries = draw(options)
    negatives.check(len(sample.bank), options.n_hard or 1)
    contrasts = []
    for name, _, path in sorted(order):
        counts = f"{counted(len(queries), 'query', 'queries')}, {len(sample.bank)} images"
        print_rank0(f"{printable(path)}: {counts}")
        contrasts.append(_contrast(path, name, sample, queries, options))
    return contrasts, sample


def draw(options: Options) -> tuple[Sample, np.ndarray]:
    """Return the sample of training images, and the indices of the queries in its bank.

    The first queries are those whose negatives are shown. Raises InputError if the images cannot be
    found.
    """
    images = registry.train_images(options.dataset, options.data, options.class_list)
    rng = np.random.default_rng(options.seed)
    bank = images.subset(np.sort(rng.permutation(len(images))[: options.images]))
    classes = samples.present(bank)
    shown = samples.queries(bank, classes, rng)[: options.queries]
    others = rng.permutation(np.setdiff1d(np.arange(len(bank)), shown))
    others = others[: options.queries - len(shown)]
    sample = Sample(bank, bank, shown, len(samples.present(images)), np.arange(len(bank)))
    return sample, np.concatenate([shown, others])


def has_classes(images: Images) -> bool:
    """Return whether the images have labels of at least two classes."""
    return images.labelled and len(samples.present(images)) > 1


def _contrast(
    path: Path, name: str, sample: Sample, queries: np.ndarray, options: Options
) -> Contrast:
    """Return the negatives of a checkpoint. Raises InputError if its features are not finite."""
    method, config, epoch = rebuild(path)
    bank, own, settings = sample.bank, method.synthetic.config, flat(config)
    queue = next((settings[one] for one in _QUEUES if one in settings), None)
    negatives_in_run = queue or method.negatives_of_batch(config.input.batch_size)
    shown, entries = (own, negatives_in_run) if own.total else (PUBLISHED, _PUBLISHED_QUEUE)
    fraction = round(shown.n_hard / entries * len(bank))
    n_hard = options.n_hard or max(1, min(fraction, len(bank) - 1))
    try:
        device = devices.for_process("auto", gpu=None, local_rank=0)
        q, k = _features(method, config, bank, queries, options.seed, device)
    except torch.OutOfMemoryError:  # a training run may use the same GPU
        q, k = _features(method, config, bank, queries, options.seed, torch.device("cpu"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    learned = method.learned_negatives
    measured = negatives.measure(
        q,
        torch.from_numpy(queries).to(q.device),
        k,
        torch.from_numpy(bank.labels).to(q.device) if has_classes(bank) else None,
        replace(shown, n_hard=n_hard),
        options.seed,
        None if learned is None else learned.to(q.device),
        pictures.NEIGHBOURS,
    )
    average = method.query_and_key[0] is not method.query_and_key[1]
    schedule = method.synthetic if own.total else None
    facts = (n_hard, schedule, queue, negatives_in_run, average)
    return Contrast(path, name, epoch, config, *facts, measured)


def _features(
    method: Method,
    config: Pretraining,
    bank: Images,
    queries: np.ndarray,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the features of the queries [Q, C], and the keys of all images in the bank [N, C].

    Queries have the first view of the run's recipe, and keys the second.
    """
    precision.prepare_model(method, device, compile=False, recompute=False)
    config = replaced(
        config,
        batch_size=64,
        batch_per_process=64,
        amp="off",
        seed=seed,
        workers=min(8, processes.cores()) if len(bank) > 512 else 0,
    )
    recipe = recipes.from_settings(config.views)
    query, key = method.query_and_key
    k = negatives.view_features(key, bank, recipe, 1, config, device)
    return negatives.view_features(query, bank.subset(queries), recipe, 0, config, device), k
