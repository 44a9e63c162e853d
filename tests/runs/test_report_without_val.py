"""The report of runs without val/ or labels: each panel shows training images."""

import json
import re
import shutil
from html import unescape

import numpy as np
import pytest
import torch
import yaml
from conftest import write_images
from folder_helpers import error_message

from moco.data import registry
from moco.encoder.resnets import resnet
from moco.report import pictures, samples, thumbnails
from moco.report.page import write

PANELS = ["Loss", "Recipe mocov2", "run", "random resnet18", "run"]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Images of three classes: with val/, without it, without folders, and as a list."""
    top = tmp_path_factory.mktemp("layouts")
    classes = write_images(top / "classes", classes=3, train=6)
    shutil.copytree(classes / "train", top / "train_only" / "train")
    shutil.copytree(top / "train_only", top / "flat_val")
    for folder in ("flat", "flat_val/val"):
        (top / folder).mkdir()
        for file in (classes / "train").rglob("*.jpg"):
            shutil.copy(file, top / folder / f"{file.parent.name}-{file.name}")
    names = (top / "flat").glob("*.jpg")
    (top / "list.txt").write_text("\n".join(f"flat/{file.name}" for file in sorted(names)))
    return top


def text_of_page(folder, data, **options):
    """Write a run folder and its report. Return the page, after a check of its panels."""
    run = folder / "run"
    run.mkdir()
    args = {"method": "moco", "arch": "resnet18", "data": str(data), "image_size": 32}
    args |= {"recipe": "mocov2", "seed": 0, "epochs": 1, "batch_size": 8} | options
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    line = {"epoch": 0, "step": 1, "loss": 1.0, "time": 1.0}
    (run / "log.jsonl").write_text(json.dumps(line))
    torch.manual_seed(0)
    weights = {f"module.encoder_q.{k}": v for k, v in resnet("resnet18", 8).state_dict().items()}
    torch.save({"state_dict": weights}, run / "checkpoint_0000.pth.tar")
    write([run], folder / "page.html")
    page = unescape((folder / "page.html").read_text())
    assert re.findall("<h4>(.*?)</h4>", page) == PANELS
    assert '<p class="absent">' not in page
    return page


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("classes", "flat_val", "list")]


@pytest.mark.parametrize("name", ["train_only", "flat", *SLOW])
def test_every_panel_is_there(name, layouts, tmp_path):
    data = layouts if name == "list" else layouts / name
    file = str(layouts / "list.txt") if name == "list" else None
    page = text_of_page(tmp_path, data, file_list=file)
    assert ("(list.txt)" in page) == (name == "list")
    labels = "without labels" if name in ("flat", "list") else "of 3 classes"
    count = "15 val" if name == "classes" else "18 train"
    assert f"{count} images {labels}, by t-SNE" in page
    assert ("Left: random val images." in page) == (name == "classes")
    assert ("Left: random training images." in page) == (name != "classes")
    assert ("✓ and a solid frame: the same class" in page) == (labels != "without labels")


def random_features(n):
    """Return n normalized features."""
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(x, dim=1)


def sample_of(data, file_list=None, images=2000):
    return samples.draw("imagenet", str(data), None, file_list, images, 0)


@pytest.mark.parametrize("images", [2000, 10, 4])
@pytest.mark.parametrize("name", ["train_only", "flat"])
def test_an_image_is_not_its_own_neighbour(name, images, layouts):
    of = sample_of(layouts / name, images=images)
    bank = random_features(len(of.bank))
    similarity, indices = pictures.nearest_others(of, bank, bank[of.in_bank])
    own = of.in_bank[of.queries]
    others = min(6, len(bank) - 1)
    assert indices.shape == (len(own), others) and not (indices == own[:, None]).any()
    wanted = bank[own] @ bank.T
    wanted[range(len(own)), own] = -2
    assert torch.allclose(similarity, wanted.topk(others).values)


def test_copies_of_an_image_are_its_neighbours(layouts):
    of = sample_of(layouts / "flat")
    bank = torch.ones(len(of.bank), 1)  # a collapsed encoder: all similarities are equal
    similarity, indices = pictures.nearest_others(of, bank, bank[of.in_bank])
    assert (similarity == 1).all() and indices.shape == (8, 6)
    assert not (indices == torch.from_numpy(of.in_bank[of.queries])[:, None]).any()
    assert all(len(set(row)) == 6 for row in indices.tolist())


def test_a_single_image_has_no_neighbours(layouts):
    of = sample_of(layouts / "flat", images=1)
    message = error_message(pictures.nearest_others, of, torch.ones(1, 1), torch.ones(1, 1))
    assert message == "1 image is too few for neighbours"


@pytest.mark.parametrize("name", ["train_only", "flat"])
def test_the_points_are_images_of_the_bank(name, layouts, monkeypatch):
    monkeypatch.setattr(samples, "POINTS", 7)
    of = sample_of(layouts / name, images=11)
    assert len(of.bank) == 11 and len(of.points) == 7 and of.counts == "11 train images"
    names = [of.bank.name(i) for i in range(11)]
    assert [of.points.name(i) for i in range(7)] == [names[i] for i in of.in_bank]
    assert len(set(of.queries)) == len(of.queries) <= 7
    samples.draw.cache_clear()


def test_neighbours_are_compared_with_val_if_there_are_labelled_images(layouts):
    of = sample_of(layouts / "classes")
    assert of.in_bank is None and len(of.points) == 15 and of.counts == "18 train and 15 val images"
    bank, points = random_features(18), random_features(15)
    similarity, _ = pictures.nearest_others(of, bank, points)
    assert torch.allclose(similarity, (points[of.queries] @ bank.T).topk(6).values)


def test_frames_and_signs_show_classes_only_if_there_are_labels(layouts):
    for name, labelled in (("train_only", True), ("flat", False)):
        of = sample_of(layouts / name)
        bank = random_features(len(of.bank))
        similarity, indices = pictures.nearest_others(of, bank, bank[of.in_bank])
        page = thumbnails.neighbours(of, similarity, indices)
        right = sum(
            of.bank.labels[i] == of.points.labels[q]
            for q, near in zip(of.queries, indices.tolist(), strict=True)
            for i in near
        )
        wrong = indices.numel() - right
        assert right and bool(wrong) == labelled
        assert page.count("<img") == indices.numel() + len(of.queries)
        assert page.count('class="hit right"') == page.count("✓") == right * labelled
        assert page.count('class="hit wrong"') == page.count("✗") == wrong * labelled
        counted = f"{right} of {indices.numel()} neighbours are of the class of their image."
        assert thumbnails.right_of(of, indices) == counted * labelled


def test_queries_are_random_and_of_different_classes(layouts):
    drawn = [samples.draw("imagenet", str(layouts / "classes"), None, None, 9, i) for i in range(6)]
    for of in drawn:
        assert len(set(of.points.labels[of.queries[:3]])) == 3 and len(set(of.queries)) == 8
    assert len({tuple(of.queries) for of in drawn}) > 3


@pytest.mark.parametrize(
    ("name", "there"),
    [("classes", True), ("train_only", False), ("flat_val", False), ("flat", False)],
)
def test_test_images_need_labels_of_both_splits(name, there, layouts):
    assert registry.has_test_images("imagenet", str(layouts / name)) is there
    assert not registry.has_test_images("imagenet", str(layouts), str(layouts / "list.txt"))
    assert registry.has_test_images("cifar10", str(layouts / "none"))
    assert registry.has_test_images("imagenet", "photos")


def test_features_of_points_are_those_of_the_bank(layouts, tmp_path, monkeypatch):
    of, calls = sample_of(layouts / "train_only"), []
    monkeypatch.setattr(
        pictures,
        "extract_features",
        lambda net, images, run: calls.append(images) or random_features(len(images)),
    )
    bank, points = pictures.sample_features(None, of, None)
    assert calls == [of.bank] and torch.equal(points, bank[np.asarray(of.in_bank)])
    pictures.sample_features(None, sample_of(layouts / "classes"), None)
    assert len(calls) == 3
