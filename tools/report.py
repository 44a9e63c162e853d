"""One picture of a pre-training run: its curves, the views it saw, and where its encoder puts the val images."""

import json
from argparse import Namespace
from pathlib import Path

import matplotlib
import torch
import yaml
from sklearn.manifold import TSNE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from moco import rng
from moco.augment import color, crop, recipes
from moco.augment.recipes import MEAN, STD
from moco.data import datasets, loader, subsets
from moco.encoder import networks, published
from moco.engine import checkpoint, features

ROWS = 8  # images in the grid of views


def draw(run: Path, weights: Path, out: Path) -> None:
    """Draw the report of the run folder `run`, whose checkpoint is `weights`, into the PNG `out`."""
    args = Namespace(**yaml.safe_load((run / "args.yaml").read_text()))
    root = datasets.find(args.data, ("train", "val"))
    train = datasets.scan(root, "train")
    train, val = (subsets.of_classes(part, args.class_list) for part in (train, datasets.scan(root, "val", train.classes)))
    net = networks.create(args.arch, 1, args.image_size)
    published.load_backbone(net, checkpoint.tensors(checkpoint.load(str(weights))), str(weights))

    figure = plt.figure(figsize=(16, 9), layout="constrained")
    curves, views, embedding = figure.subfigures(1, 3, width_ratios=(4, 3, 6))
    _curves(curves, [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
    _views(views, train, args)
    _embedding(embedding, net, val, args)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _curves(figure, lines: list[dict]) -> None:
    loss, knn = figure.subplots(2, 1, sharex=True)
    for axis, name in ((loss, "loss"), (knn, "knn")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="o" if name == "knn" else None)
        axis.grid(alpha=0.3)
    loss.set_title("contrastive loss")
    knn.set_title("k-NN top-1 on val")
    knn.set_xlabel("step")


def _views(figure, train, args: Namespace) -> None:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    picked = [round(i * (len(train) - 1) / (ROWS - 1)) for i in range(ROWS)]
    images = [train.read(i) for i in picked]
    columns = [[crop.center_view(image, args.image_size) / 255 for image in images]]
    cuts = loader.RandomCrops(recipes.of_options(args), args.seed)
    crops = [cuts(image, (0, i)) for image, i in zip(images, picked, strict=True)]
    for v, view in enumerate(cuts.recipe):
        batch = torch.stack([views[v] for views in crops])
        seen = color.augment(batch, view, rng.generator("cpu", rng.COLOR, args.seed, v))
        columns.append([(x * std + mean).clamp(0, 1) for x in seen])
    axes = figure.subplots(ROWS, len(columns))
    for column in range(len(columns)):
        axes[0, column].set_title(f"view {column}" if column else "image")
        for row in range(ROWS):
            axes[row, column].imshow(columns[column][row].permute(1, 2, 0))
            axes[row, column].axis("off")


def _embedding(figure, net, val, args: Namespace) -> None:
    x, label = features.extract(net, val, args, torch.device("cpu"))
    points = TSNE(metric="cosine", init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=0).fit_transform(x.numpy())
    axis = figure.subplots()
    colors = plt.get_cmap("tab20")
    for i, name in enumerate(val.classes):
        mine = (label == i).numpy()
        axis.scatter(*points[mine].T, s=18, color=colors(i % 20), label=name)
    axis.set_title("val images by their features (t-SNE)")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
