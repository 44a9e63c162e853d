"""Tests of `moco.load_encoder`: its features are those of the evaluations."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_helpers import smooth_rgb
from encoder_helpers import SMALL
from feature_helpers import CPU, options
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image

import moco
from moco.config import replaced
from moco.data.sources import scan
from moco.encoder import pretrained
from moco.engine.features import extract
from moco.errors import InputError

MODES = ("L", "P", "RGBA", "CMYK", "1")


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Return a folder of images of many sizes, formats and modes."""
    root = tmp_path_factory.mktemp("varied")
    folder = root / "val" / "class0"
    folder.mkdir(parents=True)
    for i, (height, width) in enumerate([(32, 32), (40, 56), (301, 97), (33, 800), (20, 20)]):
        image = Image.fromarray(smooth_rgb(height, width))
        image.save(folder / f"{i}.jpg", quality=90)
        image.save(folder / f"{i}.png")
    for mode in MODES:
        ending = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(smooth_rgb()).convert(mode).save(folder / f"mode{mode}.{ending}")
    deep = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return root


@pytest.fixture(scope="module")
def moby(shared_images, tmp_path_factory):
    """Return a checkpoint of a transformer, with another mean and std than ImageNet's."""
    from conftest import in_process

    run = tmp_path_factory.mktemp("moby") / "run"
    norm = ("--mean", 0.3, 0.4, 0.5, "--std", 0.2, 0.25, 0.3)
    words = (shared_images, *SMALL, *norm, "--queue", 40, "--save-dir", run)
    status, _, err = in_process("main_moby", *words)
    assert status == 0, err
    return run / "checkpoint_0000.pth.tar"


@pytest.fixture
def synco(pretraining):
    return pretraining / "checkpoint_0000.pth.tar"


@pytest.mark.parametrize("method", ["synco", "moby"])
def test_features_equal_those_of_knn(method, varied, request):
    file = request.getfixturevalue(method)
    images = scan(varied, "val")
    encoder = moco.load_encoder(file)
    assert len(images) == 16 and not encoder.training
    facts = {name: list(getattr(encoder, name)) for name in ("mean", "std")}
    config = replaced(options(), **facts, test_resize="scaled", batch_size=64)
    config = replaced(config, batch_per_process=64, image_size=encoder.image_size)
    expected, _ = extract(pretrained.read(str(file)).net, images, config, CPU, unit_norm=False)
    opened = [Image.open(images.path(i)) for i in range(len(images))]
    with torch.inference_mode():
        features = encoder(torch.stack([encoder.transform(image) for image in opened]))
    assert features.shape == (16, encoder.num_features) == tuple(expected.shape)
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.std(0).max() > 1e-3  # the images differ


def test_facts_are_those_of_the_file(moby):
    encoder = moco.load_encoder(moby)
    assert (encoder.arch, encoder.method, encoder.epoch) == ("test_vit", "moby", 1)
    assert encoder.image_size == 32 and encoder.num_features == 64
    assert encoder.mean == (0.3, 0.4, 0.5) and encoder.std == (0.2, 0.25, 0.3)


def test_features_are_not_the_heads_output(synco):
    encoder = moco.load_encoder(synco)
    x = torch.randn(2, 3, 32, 32)
    assert encoder(x).shape == (2, 512)
    assert torch.equal(encoder(x), encoder.net(x))


def test_the_transform_takes_a_tensor_as_well(synco, varied):
    transform = moco.load_encoder(synco).transform
    path = str(varied / "val/class0/1.png")
    assert torch.equal(transform(decode_image(path)), transform(Image.open(path)))


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("cat.jpg", TypeError, "got str; give a PIL image.*PIL.Image.open"),
        (Path("cat.jpg"), TypeError, "PIL.Image.open"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, "got ndarray; give a PIL image"),
        (torch.zeros(3, 8, 8), ValueError, r"\[3, 8, 8\] of torch.float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"\[8, 8, 3\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError, r"\[1, 3, 8, 8\]"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), ValueError, r"\[3, 0, 8\]"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_the_transform_refuses_other_things(image, error, words, synco):
    with pytest.raises(error, match=words):
        moco.load_encoder(synco).transform(image)


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    file = tmp_path / "file.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.pth: "):
        moco.load_encoder(file)


@pytest.mark.parametrize("method", ["synco", "moby"])
def test_a_saved_encoder_loads_without_options(method, tmp_path, request):
    encoder = moco.load_encoder(request.getfixturevalue(method))
    with torch.no_grad():
        next(encoder.parameters()).add_(0.1)
    saved = tmp_path / "new" / "finetuned.pth.tar"
    encoder.save(saved)
    encoder.save(str(saved))  # replaces it
    again = moco.load_encoder(saved)
    for name in ("arch", "method", "epoch", "image_size", "mean", "std", "transform"):
        assert getattr(again, name) == getattr(encoder, name), name
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), encoder(x)) and len(list(saved.parent.iterdir())) == 1


def test_evaluations_read_a_saved_encoder(synco, shared_images, tmp_path, script):
    moco.load_encoder(synco).save(tmp_path / "finetuned.pth.tar")
    words = ("--k", 1, "-b", 8, "-j", 0, "--save-dir")
    outs = []
    for file in (synco, tmp_path / "finetuned.pth.tar"):
        status, out, err = script(
            "main_knn", shared_images, "--pretrained", file, *words, tmp_path / file.name[:5]
        )
        assert status == 0 and "120 of 120 backbone tensors" in out, err
        outs.append([line for line in out.splitlines() if "Acc@1" in line])
    assert outs[0] == outs[1] and len(outs[0]) == 1


def test_an_encoder_fine_tunes_and_can_be_copied(synco):
    encoder = moco.load_encoder(synco)
    model = nn.Sequential(copy.deepcopy(encoder), nn.Linear(encoder.num_features, 2)).train()
    before = [x.clone() for x in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True)]
    assert all(changed) and len(changed) == 62
    same = zip(before, encoder.parameters(), strict=False)
    assert all(torch.equal(x, y) for x, y in same)  # the copy was trained


class _Files(Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]))


def test_the_transform_works_in_spawned_loader_processes(synco, varied):
    transform = moco.load_encoder(synco).transform
    assert len(pickle.dumps(transform)) < 1000  # without the network
    files = _Files(sorted((varied / "val/class0").iterdir()), transform)
    loader = DataLoader(files, 8, num_workers=1, multiprocessing_context="spawn")
    batch = torch.cat(list(loader))
    assert torch.equal(batch, torch.stack([files[i] for i in range(len(files))]))


def test_importing_moco_stays_fast_and_offers_one_function():
    program = (
        "import sys, moco; "
        "slow = ('torch', 'torchvision', 'timm', 'numpy', 'moco.api'); "
        "print([name for name in slow if name in sys.modules]); "
        "from moco import load_encoder; print(load_encoder.__module__, moco.__all__); "
        "print(hasattr(moco, 'lod_encoder'))"
    )
    words = [sys.executable, "-c", program]
    out = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.splitlines() == ["[]", "moco.api ['load_encoder']", "False"]
