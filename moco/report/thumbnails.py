"""Show images: the views of a run, and the nearest neighbours of some images."""

import base64
import io
from itertools import groupby

import numpy as np
from PIL import Image
from torch import Tensor

from moco.augment import crop
from moco.data.decoding import DEFAULT
from moco.data.images import Images
from moco.report import markup, pictures, samples
from moco.report.markup import escaped
from moco.report.plots import shortened
from moco.report.runs import Run
from moco.report.samples import Sample
from moco.report.views import Column, view_columns
from moco.sections_images import Decoding

ROWS = 4  # images in the table of views
THUMBNAIL = 96  # side of an image among its neighbours, in pixels
_SMALL = 64  # images of at most this side are shown with sharp pixels


def image(pixels: Tensor, alt: str) -> str:
    """Return an image [3, H, W], uint8 or float in [0, 1], as HTML."""
    x = pixels.permute(1, 2, 0)
    x = x if not x.is_floating_point() else (255 * x.clamp(0, 1)).round()
    file = io.BytesIO()
    Image.fromarray(x.numpy().astype(np.uint8)).save(file, "jpeg", quality=92, subsampling=0)
    source = base64.b64encode(file.getvalue()).decode()
    small = ' class="small"' if max(x.shape[:2]) <= _SMALL else ""
    return f'<img{small} src="data:image/jpeg;base64,{source}" alt="{escaped(alt)}">'


def views(run: Run, draws: int) -> str:
    """Return a table of some training images and their views, as training sees them.

    If there are at most two views, it shows `draws` draws of each, in epochs 0, 1, ...

    Raises InputError if the images cannot be read.
    """
    images, config = pictures.training_images(run)
    recipe = pictures.recipe(run)[1]
    picked = sorted({round(i * (len(images) - 1) / (ROWS - 1)) for i in range(ROWS)})
    draws = draws if len(recipe) <= 2 else 1
    columns = view_columns(images, picked, recipe, config.run.seed, draws, config.input)
    rows = ""
    for y in range(len(picked)):
        cells = (
            f"<td>{image(column.images[y], f'{column.title} of image {y + 1}'.strip())}</td>"
            for column in columns
        )
        rows += f"<tr>{''.join(cells)}</tr>"
    head = "".join(_heading(list(same)) for _, same in groupby(columns, lambda one: one.heading))
    return (
        f'<div class="wide" tabindex="0"><table class="views"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _heading(columns: list[Column]) -> str:
    """Return the heading of neighbouring columns that share it."""
    title, *lines = columns[0].heading.splitlines()
    text = "".join(f"<br>{escaped(line)}" for line in lines)
    return f'<th colspan="{len(columns)}"><b>{escaped(title)}</b>{text}</th>'


def neighbours(
    of: Sample,
    similarity: Tensor,
    indices: Tensor,
    decoding: Decoding = DEFAULT,
    negatives: bool = False,
) -> str:
    """Return a list of the query images, each with the training images nearest to it.

    A frame and a sign show whether a neighbour shares a class with the query, if there are labels.

    Args:
        of: the sample.
        similarity: similarities [Q, K] of each query's neighbours, from `pictures.nearest_others`.
        indices: their indices in the bank, [Q, K].
        decoding: how the images are decoded.
        negatives: whether the neighbours are negatives. If so, the sign and the frame mark false
            negatives.

    Raises InputError if an image cannot be read.
    """
    rows, hit = [], _negative if negatives else _hit
    for query, near, cosines in zip(of.queries, indices.numpy(), similarity.tolist(), strict=True):
        name = samples.names_of_classes(of.points, query)
        shown = _thumbnail(of.points, query, decoding)
        hits = "".join(
            hit(of, i, bool(same), cosine, decoding)
            for i, same, cosine in zip(near, of.same_class(query, near), cosines, strict=True)
        )
        label = escaped(shortened(name, 30))
        rows.append(
            f'<div class="row"><div class="query">{shown}<b>{label}</b></div>'
            f'<div class="nearest">{hits}</div></div>'
        )
    return f'<div class="rows">{"".join(rows)}</div>'


def _hit(of: Sample, i: int, same: bool, cosine: float, decoding: Decoding) -> str:
    """Return a neighbour with its similarity, and whether its class is right."""
    shown = _thumbnail(of.bank, i, decoding)
    if not of.bank.labelled:
        return f'<div class="hit">{shown}{cosine:.3f}</div>'
    if same:
        return f'<div class="hit right">{shown}<b>✓</b> {cosine:.3f}</div>'
    name = escaped(shortened(samples.names_of_classes(of.bank, i), 22))
    return f'<div class="hit wrong">{shown}<b>✗</b> {cosine:.3f} {name}</div>'


def _negative(of: Sample, i: int, same: bool, cosine: float, decoding: Decoding) -> str:
    """Return a negative with its similarity; a false negative is marked."""
    shown = _thumbnail(of.bank, i, decoding)
    if not of.bank.labelled:
        return f'<div class="hit">{shown}{cosine:.3f}</div>'
    name = escaped(shortened(samples.names_of_classes(of.bank, i), 22))
    if same:
        return f'<div class="hit wrong">{shown}<b>✗</b> {cosine:.3f} {name}</div>'
    return f'<div class="hit">{shown}{cosine:.3f} {name}</div>'


def _thumbnail(images: Images, i: int, decoding: Decoding) -> str:
    alt = samples.names_of_classes(images, i)
    return image(crop.center_view(images.read(i, decoding), THUMBNAIL), alt)


def right_of(of: Sample, indices: Tensor) -> str:
    """Return how many neighbours share a class with their query, as text; "" without labels."""
    if not of.bank.labelled:
        return ""
    right = sum(
        of.same_class(query, near).sum()
        for query, near in zip(of.queries, indices.numpy(), strict=True)
    )
    what = "share a class with" if of.bank.multi_label else "are of the class of"
    return f"{right} of {indices.numel()} neighbours {what} their image."


def section(title: str, text: str, panels: list[str]) -> str:
    """Return a section of wide panels, two side by side if there is room."""
    content = markup.grid(panels, "halves")
    return markup.section(title, f"<p>{escaped(text)}</p>", content) if content else ""
