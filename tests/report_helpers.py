"""Write run folders for tests of the report, and read its pages."""

import json
import re
from html.parser import HTMLParser

import torch
import yaml

from moco.encoder.resnets import resnet
from moco.report.page import write

LOGGED = (
    "loss lr momentum hardness acc1 acc5 alignment uniformity feature_std images_per_s data_wait "
    "grad_encoder u hardness_mixup hardness_noise"
).split()


def write_run(folder, data, lines=30, weights=True, logged=("loss",), **options):
    """A run folder as pre-training leaves it: 10 steps an epoch, k-NN at the end of each."""
    folder.mkdir(parents=True)
    args = {
        "method": "synco",
        "arch": "resnet18",
        "data": str(data),
        "image_size": 32,
        "recipe": "mocov2",
        "seed": 0,
        "lr": 0.03,
    }
    args |= {
        "epochs": 3,
        "batch_size": 8,
        "script": "synco",
        "class_list": None,
        "crop_min": None,
    } | options
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    log = []
    for step in range(1, lines + 1):
        values = {name: 1 / (step + place) for place, name in enumerate(logged)}
        log.append({"epoch": (step - 1) // 10, "step": step} | values | {"time": step / 10})
        if step % 10 == 0:
            log.append(
                {
                    "epoch": (step - 1) // 10,
                    "step": step,
                    "knn": 0.5 + step / 1000,
                    "knn_gain": 0.1 + step / 1000,
                    "probe": 0.4 + step / 1000,
                    "probe_train": 0.3 + step / 1000,
                    "rankme": 50 + step,
                    "time": step / 10,
                }
            )
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    if weights:
        torch.manual_seed(0)
        tensors = {
            f"module.encoder_q.{name}": tensor
            for name, tensor in resnet("resnet18", 8).state_dict().items()
        }
        torch.save({"state_dict": tensors}, folder / "checkpoint_0002.pth.tar")
    return folder


class Page(HTMLParser):
    """The tags and the text of a page, as a browser would read them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.source = [], "", path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def titles(self):
        return re.findall("<h4>(.*?)</h4>", self.source)


def made(folders, tmp_path, **options):
    write(list(folders), tmp_path / "page.html", force=True, **options)
    return Page(tmp_path / "page.html")
