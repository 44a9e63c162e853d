"""Draw a run's pictures: the views of its recipe, a map of features, and nearest neighbours."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from moco import devices
from moco.augment import crop, recipes
from moco.config import MEAN, STD, Pretraining, flat, replaced
from moco.data import registry
from moco.data.decoding import DEFAULT
from moco.data.images import Images
from moco.encoder import metadata, networks, pretrained
from moco.engine import checkpoint, features
from moco.engine.decoding import BEFORE
from moco.errors import InputError
from moco.launch import processes
from moco.report import maps, samples
from moco.report.plots import plain, printable, run_label
from moco.report.runs import Run
from moco.report.samples import Sample
from moco.report.views import views_figure
from moco.sections_images import Decoding

ROWS = 6  # images in the grid of views
NEIGHBOURS = 6
SAME, OTHER, PLAIN = "#1a8a2d", "#c62828", "#555555"  # colours of frames
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


def views(run: Run) -> Figure:
    """Return a picture of some training images and their views, as in epoch 0.

    Raises InputError if the images cannot be read.
    """
    config = settings(run, _NEEDED | _FOR_VIEWS)
    train = registry.train_images(*_data(config))
    picked = sorted({round(i * (len(train) - 1) / (ROWS - 1)) for i in range(ROWS)})
    return views_figure(train, picked, recipe(run)[1], config.run.seed, 1, config.input)


def _data(config: Pretraining) -> tuple[str, str, str | None, str | None]:
    """Return the arguments of `registry.train_images` for a run."""
    data = config.input
    return data.dataset, config.run.data, data.class_list, config.listed.file_list


def _grid(
    rows: int, columns: int, width: float, height: float, title: float
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes [rows, columns], with room for a title above the first row.

    Sizes are in inches. With so many axes, fixed positions are far faster than matplotlib's layout.
    """
    figure = Figure(figsize=(width * columns, height * rows + title), dpi=100)
    top = 1 - title / (height * rows + title)
    space = {"wspace": 0.1, "hspace": max(0.06, height / width - 0.96)}
    return figure, figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.01, "top": top} | space,
    )


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


def feature_map(points: Images, found: dict[str, Tensor]) -> Figure:
    """Return a map of images for each encoder, by t-SNE. Colours are classes, if there are labels.

    Args:
        points: N images.
        found: their features [N, D], by the name of the encoder.

    Raises InputError if there are too few images.
    """
    columns = 2 if len(found) == 4 else min(3, len(found))
    rows = -(-len(found) // columns)
    if len(points) < maps.FEWEST:
        raise InputError(f"{len(points)} images are too few for a map")
    figure = Figure(figsize=(3.5 * columns + 1.7, 3.5 * rows + 0.2), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colors = mpl.colormaps["tab20"]
    there = np.unique(points.labels)
    for axis, (name, x) in zip(axes, found.items(), strict=False):
        places = maps.tsne(x.numpy())
        dots = [
            axis.scatter(
                *places[points.labels == label].T,
                s=max(3, min(16, 6000 / len(places))),
                color=colors(i),
                linewidths=0,
            )
            for i, label in enumerate(there)
        ]
        plain([axis.set_title("?", fontsize=9)], [run_label(name)])
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("#bbbbbb")
    for axis in axes[len(found) :]:
        axis.axis("off")
    if not points.labelled:
        return figure
    look = {"loc": "outside right upper", "fontsize": 7, "frameon": False, "markerscale": 1.5}
    plain(
        figure.legend(dots, [""] * len(dots), **look).get_texts(),
        [run_label(points.classes[label], 22) for label in there],
    )
    return figure


def decoding_of(run: Run) -> Decoding:
    """Return how the images of a run are decoded. Raises InputError if args.yaml is not valid."""
    return settings(run, _NEEDED).input


def neighbours(
    of: Sample, bank: Tensor, points: Tensor, size: int, decoding: Decoding = DEFAULT
) -> Figure:
    """Return a picture of the query images, each with the other training images nearest to it.

    Without labels, no frame shows whether a neighbour is of the same class.

    Args:
        of: the sample.
        bank: features of its training images, [N, D].
        points: features of its images on the map, [M, D].
        size: side of each image, in pixels.
        decoding: how the images are decoded.

    Raises InputError if an image cannot be read, or if there is no other training image.
    """

    def read(images: Images, i: int) -> Tensor:
        return crop.center_view(images.read(i, decoding), size)

    similarity, indices = _nearest_others(of, bank, points)
    rows, columns = len(of.queries), 1 + indices.shape[1]
    figure, axes = _grid(rows, columns, width=0.95, height=1.2, title=0.22)
    for row, query in zip(range(rows), of.queries, strict=True):
        label = of.points.labels[query]
        name = of.points.classes[label] if of.points.labelled else of.points.name(query)
        _framed(axes[row, 0], read(of.points, query), PLAIN, run_label(name, 15))
        nearest = zip(indices[row].tolist(), similarity[row].tolist(), strict=True)
        for axis, (i, cosine) in zip(axes[row, 1:], nearest, strict=True):
            same = of.bank.labels[i] == label
            frame, mark = (SAME, "") if same else (OTHER, " x")
            frame = frame if of.bank.labelled else PLAIN
            _framed(axis, read(of.bank, i), frame, f"{cosine:.3f}{mark}")
    return figure


def _nearest_others(of: Sample, bank: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
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


def _framed(axis, image: Tensor, frame: str, title: str) -> None:
    """Draw an image [3, H, W] with a frame in the colour `frame`, and a title above."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    plain([axis.set_title("?", fontsize=7, pad=3)], [printable(title)])
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color=frame, linewidth=3)
