"""Test the converter to detectron2, and training and evaluation on tiny VOC and COCO trees.

Tests that need detectron2 are skipped if it is not installed; .ci/run installs it.
"""

import importlib
import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import own_lines, shell, wants_detectron2
from detection_helpers import HERE, converter, published
from detection_trees import write_coco, write_voc
from run_helpers import typed

from moco.errors import InputError

pytestmark = pytest.mark.slow


# Configurations
CONVERTED = ("_moco", "_synco", "_adco")  # endings of the configs for converted checkpoints


def configs():
    return sorted((HERE / "configs").glob("*.yaml"))


@wants_detectron2
@pytest.mark.parametrize("file", configs(), ids=lambda file: file.stem)
def test_every_config_builds_the_model_that_it_says(file):
    from detectron2.modeling import build_model

    cfg = importlib.import_module("c4").config(file, ["MODEL.WEIGHTS", ""], gpus=0)
    mine, coco = file.stem.endswith(CONVERTED), file.stem.startswith("coco")
    solver, resnets = cfg.SOLVER, cfg.MODEL.RESNETS
    assert (solver.IMS_PER_BATCH, cfg.TEST.PRECISE_BN.ENABLED) == (16, True)
    assert solver.BASE_LR == (0.01 if file.stem.endswith("_synco") else 0.02)
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.ROI_HEADS.NAME, resnets.DEPTH) == (
        0,
        "Res5ROIHeadsExtraNorm",
        50,
    )
    assert (resnets.NORM, cfg.MODEL.DEVICE) == ("BN", "cpu")  # what SyncBN becomes there
    assert (cfg.INPUT.FORMAT, resnets.STRIDE_IN_1X1) == (("RGB", False) if mine else ("BGR", True))
    assert (cfg.MODEL.PIXEL_STD[0] == 58.395) == mine
    if "Base" not in file.stem:
        schedule = {
            "12k": (9000, 11000),
            "24k": (18000, 22000),
            "1x": (60000, 80000),
            "2x": (120000, 160000),
        }
        last = {"12k": 12000, "24k": 24000, "1x": 90000, "2x": 180000}
        name = next(word for word in file.stem.split("_") if word in last)
        assert (solver.STEPS, solver.MAX_ITER, cfg.MODEL.MASK_ON) == (
            schedule[name],
            last[name],
            coco,
        )
        assert solver.WARMUP_ITERS == (1000 if coco else 100)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == (80 if coco else 20)
        trained = ("coco_2017_train",) if coco else ("voc_2007_trainval", "voc_2012_trainval")
        tested = ("coco_2017_val",) if coco else ("voc_2007_test",)
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (trained, tested)
        assert (cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MIN_SIZE_TEST) == (
            (640, 800) if coco else (480, 800)
        )
    model = build_model(cfg)
    assert isinstance(model.roi_heads.res5.norm, torch.nn.BatchNorm2d)
    assert all(p.requires_grad for p in model.parameters())
    assert model.backbone.res3[0].conv2.stride == ((2, 2) if mine else (1, 1))


def test_every_schedule_has_a_config_for_each_repository():
    names = {file.stem for file in configs()}
    for schedule in ("pascal_voc_R_50_C4_12k", "pascal_voc_R_50_C4_24k"):
        assert {schedule, *(schedule + ending for ending in CONVERTED)} <= names
    for schedule in ("coco_R_50_C4_1x", "coco_R_50_C4_2x"):
        assert {schedule, *(schedule + ending for ending in CONVERTED)} <= names


@wants_detectron2
@pytest.mark.parametrize("data", ["pascal_voc_R_50_C4_24k", "coco_R_50_C4_2x"])
@pytest.mark.parametrize(("ending", "lr"), [("_moco", 0.02), ("_synco", 0.01), ("_adco", 0.02)])
def test_the_commands_of_the_three_repositories(data, ending, lr, tmp_path, monkeypatch, capsys):
    """Run them in the folder of the scripts, as the READMEs say."""
    train_net = importlib.import_module("train_net")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(HERE / "configs")
    torch.save(published("resnet50"), tmp_path / "input.pth.tar")
    converted = "convert-pretrain-to-detectron2.py input.pth.tar output.pkl".split()
    monkeypatch.setattr(sys, "argv", converted)
    assert converter.main() == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    command = f"--config-file configs/{data}{ending}.yaml --num-gpus 8 MODEL.WEIGHTS ./output.pkl"
    cfg = train_net.configure(train_net.parser().parse_args(command.split()))
    assert f"8 process(es) on cuda, batch 16, lr {lr:g}" in capsys.readouterr().out
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (lr, 16)
    steps = (18000, 22000) if "voc" in data else (120000, 160000)
    assert (cfg.SOLVER.STEPS, cfg.MODEL.RESNETS.NORM, cfg.INPUT.FORMAT) == (steps, "SyncBN", "RGB")
    # since AdCo's settings are MoCo's, only the name differs; SynCo's differ in the rate alone
    moco = train_net.c4.config(Path(f"configs/{data}_moco.yaml"), command.split()[-2:], 8)
    moco.SOLVER.BASE_LR = lr
    assert moco == cfg


@wants_detectron2
def test_norm_is_synchronized_over_several_gpus_only(capsys):
    c4, file = importlib.import_module("c4"), HERE / "configs" / "pascal_voc_R_50_C4_24k.yaml"
    assert (
        c4.config(file, [], gpus=8).MODEL.RESNETS.NORM == "SyncBN" and not capsys.readouterr().out
    )
    one = c4.config(file, [], gpus=1)
    assert (one.MODEL.RESNETS.NORM, one.MODEL.DEVICE) == (
        "BN",
        "cuda",
    ) and "BN" in capsys.readouterr().out


@wants_detectron2
def test_the_schedule_fits_fewer_gpus(monkeypatch, capsys):
    """An eighth of the batch and of the learning rate, eight times the iterations."""
    train_net = importlib.import_module("train_net")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    file = str(HERE / "configs" / "pascal_voc_R_50_C4_24k.yaml")
    args = {"config_file": file, "opts": [], "num_machines": 1, "resume": False}
    for gpus, scale in ((1, 8), (2, 4), (8, 1)):
        solver = train_net.configure(Namespace(**args, num_gpus=gpus, auto_scale=True)).SOLVER
        assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16 / scale, pytest.approx(0.02 / scale))
        assert (solver.MAX_ITER, solver.STEPS) == (24000 * scale, (18000 * scale, 22000 * scale))
        assert solver.WARMUP_ITERS == 100 * scale
        assert f"batch {16 // scale}, lr {0.02 / scale:g}" in capsys.readouterr().out
    assert (
        train_net.configure(Namespace(**args, num_gpus=2, auto_scale=False)).SOLVER.IMS_PER_BATCH
        == 16
    )
    assert "--auto-scale" in capsys.readouterr().out


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_voc(root, 2007, "trainval", 4, seed=0)
    write_voc(root, 2012, "trainval", 4, seed=1)
    write_voc(root, 2007, "test", 3, seed=2)
    write_coco(root, "train", 4, seed=3)
    write_coco(root, "val", 3, seed=4)
    return root


SMALL = (
    "INPUT.MIN_SIZE_TRAIN (96,) INPUT.MIN_SIZE_TEST 96 SOLVER.IMS_PER_BATCH 2"
    " DATALOADER.NUM_WORKERS 0"
    " TEST.PRECISE_BN.NUM_ITER 2 SOLVER.MAX_ITER 4 SOLVER.STEPS (3,)"
    " MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16"
    " MODEL.RPN.PRE_NMS_TOPK_TRAIN 200 MODEL.RPN.POST_NMS_TOPK_TRAIN 50"
    " MODEL.RPN.PRE_NMS_TOPK_TEST 200 MODEL.RPN.POST_NMS_TOPK_TEST 50 TEST.DETECTIONS_PER_IMAGE 20"
    " MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0"
).split()


@wants_detectron2
@pytest.mark.parametrize(("data", "arch"), [("voc", "resnet50"), ("coco", "resnet18")])
def test_from_pretraining_to_ap(data, arch, datasets, script, shared_images, tmp_path):
    """Run run.sh on a checkpoint of main_synco.py; a second start only tests again."""
    options = (
        "--image-size 32 -b 16 -j 0 --epochs 1 --moco-k 64 --n-hard 16 --n1 2 --n4 2 "
        "--warmup-epochs 0 --bn-splits 1"
    )
    status, _, err = script(
        "main_synco",
        shared_images,
        "-a",
        arch,
        *options.split(),
        "--save-dir",
        tmp_path / "pretrain",
    )
    assert status == 0, err
    checkpoint = next((tmp_path / "pretrain").glob("checkpoint_*.pth.tar"))
    out = tmp_path / "out"
    env = {
        **os.environ,
        "DETECTRON2_DATASETS": str(datasets),
        "PYTHON": sys.executable,
        "GPUS": "0",
    }

    def run():
        command = [HERE / "run.sh", checkpoint, data, out, *SMALL]
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((out / "results.json").read_text())

    said, found = run()
    assert "backbone tensors arrived in detectron2's model" in said and "arrived bit by bit" in said
    assert "MODEL.RESNETS.NORM BN" in said and "1 process(es) on cpu, batch 2, lr 0.02" in said
    kinds = ("box", "mask") if data == "coco" else ("box",)
    assert list(found["metrics"]) == [
        f"{kind}_{name}" for kind in kinds for name in ("ap", "ap50", "ap75")
    ]
    assert all(0 <= value <= 1 for value in found["metrics"].values())
    assert found["checkpoint"] == str(checkpoint)
    want = {"method": "synco", "arch": arch, "pretrain_epochs": 1, "protocol": "detection 0.0005k"}
    assert found | want == found
    assert found["dataset"] == ("coco_2017_val" if data == "coco" else "voc_2007_test")
    trained = torch.load(out / "model_final.pth", weights_only=False)["model"]
    converted = pickle.loads((out / "weights.pkl").read_bytes())["model"]
    assert not np.array_equal(
        trained["backbone.stem.conv1.weight"], converted["stem.conv1.weight"]
    )  # FREEZE_AT 0
    assert trained["roi_heads.res5.norm.running_mean"].abs().sum() > 0
    if data == "coco":
        said, again = run()
        assert "arrived bit by bit" not in said and again == found
        config = HERE / "configs" / "coco_R_50_C4_1x_moco.yaml"
        options = [
            *SMALL,
            "MODEL.WEIGHTS",
            out / "model_final.pth",
            "OUTPUT_DIR",
            tmp_path / "tested",
        ]
        done = shell(
            HERE / "train_net.py",
            *typed("--config-file {} --num-gpus 0 --eval-only", config),
            *options,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        assert (
            json.loads((tmp_path / "tested" / "results.json").read_text()) == found
        )  # the arch too is the trained one's
        table = shell("tools/collect.py", tmp_path).stdout
        assert "coco_2017_val detection 0.0005k, mask AP50" in table


@wants_detectron2
def test_eighty_iterations_lower_the_loss(datasets, tmp_path):
    torch.save(published("resnet18"), tmp_path / "encoder.pth.tar")
    converter.write(tmp_path / "weights.pkl", converter.convert(str(tmp_path / "encoder.pth.tar")))
    train_net = importlib.import_module("train_net")
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import register_pascal_voc

    register_pascal_voc("tiny_voc", str(datasets / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    options = [
        "MODEL.WEIGHTS",
        tmp_path / "weights.pkl",
        "OUTPUT_DIR",
        tmp_path,
        "DATASETS.TRAIN",
        "('tiny_voc',)",
    ]
    options += [
        "INPUT.MIN_SIZE_TRAIN",
        "(64,)",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
        8,
        "DATASETS.TEST",
        "()",
    ]
    options += [
        "SOLVER.IMS_PER_BATCH",
        1,
        "SOLVER.MAX_ITER",
        80,
        "SOLVER.STEPS",
        "(70,)",
        "SOLVER.WARMUP_ITERS",
        10,
        "SEED",
        1,
    ]
    file = HERE / "configs" / "pascal_voc_R_50_C4_24k_moco.yaml"
    cfg = train_net.c4.config(file, [*SMALL, *map(str, options)], gpus=0)
    trainer = train_net.Trainer(cfg)
    trainer.resume_or_load(resume=False)
    train_net.check_loaded(cfg, trainer.model)
    trainer.train()
    loss = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(loss) == 80 and np.mean(loss[-8:]) < 2 / 3 * np.mean(loss[:4]), loss


@wants_detectron2
def test_a_backbone_that_did_not_arrive_ends_the_run(datasets, tmp_path):
    """Check a newly initialised model.

    Only the scales and shifts of its norms, ones and zeros, happen to be right.
    """
    train_net = importlib.import_module("train_net")
    torch.save(published("resnet18"), tmp_path / "encoder.pth.tar")
    found = converter.convert(str(tmp_path / "encoder.pth.tar"))
    converter.write(tmp_path / "weights.pkl", found)
    cfg = train_net.c4.config(
        HERE / "configs" / "coco_R_50_C4_1x_moco.yaml",
        ["MODEL.WEIGHTS", str(tmp_path / "weights.pkl")],
        0,
    )
    with pytest.raises(RuntimeError, match=r"60 tensors did not arrive"):
        train_net.check_loaded(cfg, train_net.Trainer.build_model(cfg))


@wants_detectron2
def test_what_cannot_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    train_net = importlib.import_module("train_net")
    config = HERE / "configs" / "pascal_voc_R_50_C4_24k_moco.yaml"
    torch.save(published("resnet18"), tmp_path / "encoder.pth.tar")
    found = converter.convert(str(tmp_path / "encoder.pth.tar"))
    for name in ("a", "b"):
        converter.write(
            tmp_path / f"{name}.pkl",
            found | {"source": {"file": name, "arch": "resnet18", "sha256": name}},
        )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_final.pth")
    (tmp_path / "run" / "source.json").write_text(
        json.dumps({"file": "elsewhere/a", "arch": "resnet18", "sha256": "a"})
    )
    (tmp_path / "damaged.pkl").write_bytes(b"\x80\x04.")
    (tmp_path / "unreadable.pkl").symlink_to("/proc/self/mem")
    resumed = ("--resume", "--config-file", config, "OUTPUT_DIR", tmp_path / "run", "MODEL.WEIGHTS")
    weights = ("MODEL.WEIGHTS", tmp_path / "a.pkl")
    for options, said in (
        (("--config-file", config), "FILE.pkl: no such file"),
        (("--config-file", config, "MODEL.WEIGHTS", tmp_path / "damaged.pkl"), "damaged"),
        (
            ("--config-file", config, "MODEL.WEIGHTS", tmp_path / "unreadable.pkl"),
            "unreadable.pkl: cannot be read: Input/output",
        ),
        (
            ("--config-file", config, "MODEL.WEIGHTS", "gs://a/b.pkl"),
            "MODEL.WEIGHTS gs://a/b.pkl: is a URL",
        ),
        (("--config-file", tmp_path / "none.yaml"), "no such config; MoCo's, SynCo's and AdCo's"),
        (("--config-file", tmp_path / config.name), f"no such config; give {config}"),
        ((), "give --config-file"),
        (
            ("--num-gpus", torch.cuda.device_count() + 1, "--config-file", config),
            "this machine has",
        ),
        (("--config-file", config, "SOLVER.LR", 1), "SOLVER.LR"),
        (
            ("--auto-scale", "--config-file", config, *weights, "SOLVER.IMS_PER_BATCH", 12),
            "IMS_PER_BATCH 12",
        ),
        (("--config-file", config, "SOLVER.BASE_LR"), "pairs"),
        (("--config-file", config, *weights), "DETECTRON2_DATASETS"),
        (
            ("--config-file", HERE / "configs" / "coco_R_50_C4_1x.yaml", *weights),
            "ends in _moco, _synco",
        ),
        ((*resumed, tmp_path / "b.pkl"), "started from elsewhere/a"),
        ((*resumed, tmp_path / "a.pkl"), "DETECTRON2_DATASETS"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, options)])
        capsys.readouterr()
        assert train_net.main() == 2
        err = capsys.readouterr().err
        assert said in err and len(own_lines(err)) == 1, err


def test_run_sh_says_how_it_is_used():
    for arguments in ((), ("a", "b", "c"), ("a", "voc")):
        done = subprocess.run([HERE / "run.sh", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_an_error_is_the_projects_own():
    """detection/ and moco/ share one kind of mistake."""
    assert converter.InputError is InputError
