"""Write a run's TensorBoard events: metrics in groups, settings, and the views of a first batch."""

import io

import torch
import torch.nn.functional as F
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.functional import to_pil_image

from moco.augment import color
from moco.augment.recipes import Recipe
from moco.config import Training, flat
from moco.engine.resume import MAY_DIFFER
from moco.files import as_utf8

_GROUPS = {
    "loss": ("loss", "acc1", "acc5", "cosine"),
    "optim": ("lr", "momentum", "grad_"),
    "eval": ("knn", "val_", "probe"),
    "time": ("epoch", "time", "images_per_s", "data_wait"),
}
_LONGER = {"images_per_s": "images_per_second", "time": "seconds"}


def tag(name: str) -> str:
    """Return the tag of a metric of log.jsonl: its group and its name, such as loss/acc1.

    Metrics of other names are in the group `features`.
    """
    group = next(
        (
            group
            for group, names in _GROUPS.items()
            for one in names
            # a name that ends in _ is the start of several
            if name == one or name.startswith(one if one.endswith("_") else f"{one}_")
        ),
        "features",
    )
    return f"{group}/{_LONGER.get(name, name)}"


def tagged(values: dict[str, float]) -> dict[str, float]:
    """Return the values by tag."""
    return {tag(name): value for name, value in values.items()}


IMAGES, VIEWS = 8, 12  # maximum number of images and views to show
GAP = 4  # pixels between views


class Board:
    """The TensorBoard events of a run.

    Args:
        config: the settings of the run. Options of launching, logging and saving are no
            hyperparameters.
        start: the step to begin at. Events of a resumed run's later steps are dropped.

    Raises OSError if the folder cannot be written.
    """

    def __init__(self, config: Training, start: int):
        self.config, resumed = config, bool(config.log.resume)
        self.writer = SummaryWriter(
            config.run.save_dir, purge_step=start + 1 if resumed and start >= 0 else None
        )
        self._shows_views = not resumed
        rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in flat(config).items())
        self.writer.add_text("config", f"| option | value |\n|---|---|\n{rows}", max(start, 0))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write metrics by tag. Raises OSError if they cannot be written."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def views(self, views: list[Tensor], recipe: Recipe) -> None:
        """Write an image of the run's first views, unless the run was resumed.

        Each row shows one view of several images. Draws no random numbers.

        Args:
            views: the normalized views that the network sees, each [B, 3, H, W].
            recipe: the views' recipe, which has their mean and standard deviation.
        """
        if self._shows_views:
            self._shows_views = False
            summary = _image("views/first_batch", tiles(views[:VIEWS], recipe))
            self.writer.file_writer.add_summary(summary, 0)

    def close(self, finished: bool) -> None:
        """Write the hyperparameters of a finished run, and flush the events.

        TensorBoard's page of hyperparameters shows the last values of the run's metrics next to
        them. A run is one row there, also if it was resumed.

        Raises OSError if the events cannot be written.
        """
        if finished:
            settings = flat(self.config)
            kept = settings.keys() - MAY_DIFFER | {"batch_size", "accumulation_steps"}
            values = {
                name: value if isinstance(value, bool | int | float) else _cell(value)
                for name, value in sorted(settings.items())
                if name in kept and value not in (None, [])
            }
            # Without the first summary, which lists the columns of one run, TensorBoard finds the
            # columns of all runs that it shows.
            _, *session = hparams(values, {})
            for summary in session:
                self.writer.file_writer.add_summary(summary)
        self.writer.close()


def _cell(value: object) -> str:
    """Return the value of an option as text in a table."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return as_utf8(text).replace("|", "\\|")


def _image(name: str, image: Tensor) -> Summary:
    """Return the summary of an image [3, H, W] in [0, 1], as a JPEG.

    SummaryWriter's own images are PNGs of several megabytes, which take seconds to write.
    """
    picture, file = to_pil_image(image), io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    shown = Summary.Image(
        height=picture.height,
        width=picture.width,
        colorspace=3,
        encoded_image_string=file.getvalue(),
    )
    return Summary(value=[Summary.Value(tag=name, image=shown)])


@torch.no_grad()
def tiles(views: list[Tensor], recipe: Recipe) -> Tensor:
    """Return an image [3, H, W] in [0, 1]: a row for each view, a column for each image.

    Smaller views are padded in white to the size of the largest.
    """
    rows = []
    size = max(view.shape[-1] for view in views) + GAP
    for seen, view in zip(views, recipe, strict=False):
        # denormalized as by the renderer of tools/show_views.py
        shown = color.denormalize(seen[:IMAGES].float().cpu(), view.mean, view.std)
        width, height = size - shown.shape[-1], size - shown.shape[-2]
        rows.append(torch.cat(list(F.pad(shown, (0, width, 0, height), value=1.0)), dim=2))
    return torch.cat(rows, dim=1)
