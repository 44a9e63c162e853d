"""The benchmarks refuse senseless options with one line and status 2, before they measure."""

import importlib
import sys

import pytest
from conftest import ROOT, write_images
from PIL import Image

from moco.errors import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("cost --rounds 5", "--rounds"),
        ("cost configs/nofile.yaml", "configs/nofile.yaml"),
        (f"cost {ROOT}/configs/lincls_moco.yaml", "lincls_moco.yaml"),
        ("ddp --processes 0", "--processes"),
        ("ddp --arch nonet", "--arch"),
        ("ddp --batch 1", "--batch"),
        ("ddp --size 0", "--size"),
        ("ddp --raunds 1", "--rounds"),
        ("false_negatives --views 1", "--views"),
        ("false_negatives --rows 100", "--rows"),
        ("false_negatives --chunk 1", "--chunk"),
        ("false_negatives --device tpu", "--device"),
        ("faults --rounds 5", "--rounds"),
        ("faults --processes 0", "--processes"),
        ("faults --processes 3", "--batch-size"),
        ("faults --stops 0", "--stops"),
        ("family --epochs 0", "--epochs"),
        ("gpu --seeds -1", "--seeds"),
        ("gpu --minutes 0", "--minutes"),
        ("loader --images 0", "--images"),
        ("loader --size -1", "--size"),
        ("loader --small --large", "--large"),
        ("loader --data nofolder", "--data"),
        ("loader --batch 8", "--batch"),
        ("loader --small --size 64", "--size"),
        ("loader --small --images 8", "--batch"),
        ("loader --shards --images 8", "--images"),
        ("loader --shards --compile", "--compile"),
        ("memory --arch nonet", "--arch"),
        ("memory --blocks 0", "--blocks"),
        ("memory --gib 0", "--gib"),
        ("methods --seeds -1", "--seeds"),
        ("methods --methods moco9", "--methods"),
        ("names --names 100", "--names"),
        ("names --compared 100", "--compared"),
        ("negatives --n 0", "--n"),
        ("negatives --n-hard 70000", "--n-hard"),
        ("negatives --counts 1 1 1 1 1 -1", "--counts"),
        ("negatives --counts 0 0 0 0 0 0", "--counts"),
        ("probe --arch nonet", "--arch"),
        ("probe --epochs 0", "--epochs"),
        ("probe --data nofolder", "--data"),
        ("run nopart", "nopart"),
        ("scaling", "--predict"),
        ("scaling --node 0", "--node"),
        ("scaling --network 0", "--network"),
        ("scaling --efficiency 1.5", "--efficiency"),
        ("scaling --ranks 1", "--ranks"),
        ("startup --files 0", "--files"),
        ("startup --files 10 --classes 20", "--files"),
        ("step --arch vit_small", "--arch"),
        ("step --k 10", "--k"),
        ("step --processes 0", "--processes"),
        ("threads --arch nonet", "--arch"),
        ("threads --busy 0", "--busy"),
        ("threads --batch-size 1", "--batch-size"),
    ],
)
def test_a_senseless_option_is_one_line(command, named, monkeypatch, capsys):
    name, *words = command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        importlib.import_module("measure").main(module.main)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert named in error.splitlines()[-1]
    assert name == "run" or len(error.splitlines()) == 1


def test_the_loader_s_benchmark_refuses_images_of_several_sizes(tmp_path):
    data, made = write_images(tmp_path), importlib.import_module("loader_images")
    assert len(made.in_memory(data, 24)) == 24
    Image.new("RGB", (41, 40)).save(data / "train" / "class0" / "0.jpg")
    with pytest.raises(InputError, match="the images differ in size"):
        made.in_memory(data, 24)
