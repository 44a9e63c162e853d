"""Read a run's images and encoders, and compute the features that the report shows."""

from pathlib import Path

import torch
from torch import Tensor, nn

from moco import devices
from moco.augment import recipes
from moco.config import MEAN, STD, Pretraining, flat, replaced
from moco.data import registry
from moco.data.images import Images
from moco.encoder import metadata, networks, pretrained
from moco.engine import checkpoint, features
from moco.engine.decoding import BEFORE
from moco.errors import InputError
from moco.launch import processes
from moco.report import samples
from moco.report.runs import Run
from moco.report.samples import Sample
from moco.sections_images import Decoding

NEIGHBOURS = 6
_NEEDED = {"arch": str, "data": str, "image_size": int, "dataset": str, "stem": str}
_NEEDED |= {"norm_eps": str}
_OPTIONAL = {"class_list": str | None, "file_list": str | None, "exif": str | None}
_OPTIONAL |= {"white": float | None}
_FOR_VIEWS = {"recipe": str, "seed": int}
# for runs of older versions, which lack these options
_DEFAULTS = {
    "class_list": None,
    "file_list": None,
    "crop_min": None,
    "dataset": "imagenet",
    "stem": "imagenet",
}
_DEFAULTS |= {"mean": list(MEAN), "std": list(STD), "norm_eps": "timm"} | BEFORE


def settings(run: Run, needed: dict[str, type]) -> Pretraining:
    """Return the run's settings.

    Args:
        run: the run.
        needed: the type of each setting that the run must have, by name.

    Raises InputError if args.yaml lacks one of them, or has a value of another type.
    """
    args = _DEFAULTS | run.args
    for name, type_ in (needed | _OPTIONAL).items():
        if not isinstance(args.get(name), type_):
            raise InputError(
                f"{run.folder / 'args.yaml'}: {name} is {args.get(name)!r}, which is not valid"
            )
    for name in ("mean", "std"):
        if metadata.channels(args[name], name) is None:
            raise InputError(
                f"{run.folder / 'args.yaml'}: {name} is {args[name]!r}, which is not valid"
            )
    shared = {name: value for name, value in args.items() if name in flat(Pretraining())}
    return replaced(Pretraining(), **shared)


def recipe(run: Run) -> tuple[str, recipes.Recipe]:
    """Return the name of the run's recipe, and its views. Raises InputError if it has none."""
    views = settings(run, _NEEDED | _FOR_VIEWS).views
    try:
        return views.recipe, recipes.from_settings(views)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{run.folder / 'args.yaml'}: its options do not define views ({error})"
        ) from None


def training_images(run: Run) -> tuple[Images, Pretraining]:
    """Return the training images of a run, and its settings.

    Raises InputError if the images cannot be found.
    """
    config = settings(run, _NEEDED | _FOR_VIEWS)
    return registry.train_images(*_data(config)), config


def _data(config: Pretraining) -> tuple[str, str, str | None, str | None]:
    """Return the arguments of `registry.train_images` for a run."""
    data = config.input
    return data.dataset, config.run.data, data.class_list, config.listed.file_list


def sample_of(run: Run, images: int, seed: int) -> Sample:
    """Return the sample of the run's data set; see `samples.draw`."""
    return samples.draw(*_data(settings(run, _NEEDED)), images, seed)


def encoder(run: Run, weights: Path | None) -> tuple[nn.Module, str]:
    """Return the encoder of a run without projection head, and a text that names its checkpoint.

    Args:
        run: the run.
        weights: a checkpoint; by default the latest one of the run that can be read.

    Raises InputError if no checkpoint can be read.
    """
    config = settings(run, _NEEDED)
    skipped = []
    for file in [weights] if weights else run.checkpoints():
        try:
            net = _network(config)
            tensors = pretrained.tensors_of(net, checkpoint.load(str(file)))
            pretrained.load_backbone(net, tensors, str(file))
            return net, "; ".join([*skipped, f"encoder of {file.name}"])
        except InputError as error:
            skipped.append(str(error))
    raise InputError("; ".join(skipped) or "no checkpoint in the folder")


def random_encoder(run: Run, seed: int) -> nn.Module:
    """Return a randomly initialized encoder with the run's architecture."""
    config = settings(run, _NEEDED)
    torch.manual_seed(seed)
    return _network(config)


def _network(config: Pretraining) -> nn.Module:
    """Return the network of a run, randomly initialised."""
    network = config.network
    size = config.views.image_size
    return networks.create(network.arch, 1, size, stem=network.stem, norm_eps=network.norm_eps)


def extract_features(net: nn.Module, images: Images, run: Run) -> Tensor:
    """Return the normalized features of `images`, [N, D], on the CPU.

    Raises InputError if a feature is NaN or infinite, or if an image cannot be read.
    """
    config = replaced(
        settings(run, _NEEDED),
        batch_size=64,
        batch_per_process=64,
        amp="off",
        workers=min(8, processes.cores()) if len(images) > 512 else 0,
    )
    try:
        device = devices.for_process("auto", gpu=None, local_rank=0)
        x, _ = features.extract(net.to(device), images, config, device, on_host=True)
    except torch.OutOfMemoryError:  # a training run may use the same GPU
        x, _ = features.extract(net.cpu(), images, config, torch.device("cpu"))
    if not x.isfinite().all():
        raise InputError("the encoder's features contain NaN or infinity: it has diverged")
    return x


def sample_features(net: nn.Module, of: Sample, run: Run) -> tuple[Tensor, Tensor]:
    """Return the features of the sample's `bank` and `points`; see `extract_features`."""
    bank = extract_features(net, of.bank, run)
    points = extract_features(net, of.points, run) if of.in_bank is None else bank[of.in_bank]
    return bank, points


def decoding_of(run: Run) -> Decoding:
    """Return how the images of a run are decoded. Raises InputError if args.yaml is not valid."""
    return settings(run, _NEEDED).input


def nearest_others(of: Sample, bank: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities [Q, K] of each query's neighbours, and their indices in the bank.

    A query is not its own neighbour. Raises InputError if the bank has no other image.
    """
    own = of.in_bank is not None
    if len(bank) <= own:
        raise InputError(f"{len(bank)} image is too few for neighbours")
    similarity, indices = features.nearest(
        bank, torch.arange(len(bank)), points[of.queries], NEIGHBOURS + own
    )
    if not own:
        return similarity, indices
    others = indices != torch.from_numpy(of.in_bank[of.queries])[:, None]
    # copies of a query may push it out of its nearest images; the last of these is then left out
    others[others.all(1), -1] = False
    kept = (len(others), -1)
    return similarity[others].view(kept), indices[others].view(kept)
