"""Pre-train networks of timm and torchvision with each script, and use their checkpoints."""

import json
import signal

import pytest
import torch
from conftest import in_process, shell
from fault_helpers import logged, until
from run_helpers import facts, load, log, refused, same, succeeded, typed
from safetensors import safe_open
from voc_tree import write_voc

from moco.encoder import networks, pretrained
from moco.engine.trainer import Trainer
from moco.launch import launch
from moco.launch.interrupt import STATUS

INPUT = typed("--image-size 32 -b 8 -j 0 --save-every 1")
SYNCO = typed("--moco-k 64 --moco-dim 16 --n-hard 8 --n1 2 --n4 2 --warmup-epochs 0 --mlp")
# a command of each script, its network, and the name of the network in checkpoints
RUNS = {
    "synco": ("main_synco", SYNCO, "timm:test_convnext", "test_convnext"),
    "adco": (
        "main_adco",
        typed("--cluster 20 --no-ad-init --multi-crop"),
        "timm:resnet18",
        "timm:resnet18",
    ),
    "sogclr": (
        "main_sogclr",
        typed("--mlp-dim 32 --dim 16"),
        "mobilenet_v3_small",
        "torchvision:mobilenet_v3_small",
    ),
    "fnc": (
        "main_fnc",
        typed("--support-size 1 --memory-multiplier 5 --proj-out-dim 16"),
        "test_vit",
        "test_vit",
    ),
}
PREFIX = {"sogclr": "module.base_encoder."}


# the quick tests use one network of each library
EACH = pytest.mark.parametrize(
    "trained",
    ["synco", "sogclr", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adco", "fnc"))],
    indirect=True,
)
ONE = pytest.mark.parametrize("trained", ["sogclr"], indirect=True)


@pytest.fixture(scope="module", params=RUNS)
def trained(request, shared_images, tmp_path_factory):
    """Return a method, the name of its network in checkpoints, and a checkpoint."""
    script, options, arch, saved = RUNS[request.param]
    run = tmp_path_factory.mktemp(request.param)
    words = (shared_images, *INPUT, *options, "-a", arch, "--epochs", 1, "--knn-every", 1)
    status, _, err = in_process(script, *words, "--save-dir", run)
    assert status == 0, err
    assert 0 <= log(run)[-1]["knn"] <= 1
    return request.param, saved, run / "checkpoint_0000.pth.tar"


def test_checkpoint_has_the_network_under_an_unambiguous_name(trained):
    method, arch, file = trained
    state = load(file)
    assert state["arch"] == state["args"]["arch"] == arch
    start, net = PREFIX.get(method, "module.encoder_q."), networks.create(arch, 0, 32)
    tensors = state["state_dict"]
    assert {f"{start}{name}" for name in net.state_dict()} < tensors.keys()
    head = f"{start}{networks.head_name(net)}."
    first = min(name for name in tensors if name.startswith(head) and name.endswith("weight"))
    assert tensors[first].shape[1] == networks.num_features(net)


@EACH
def test_every_evaluation_reads_the_checkpoint(trained, script, shared_images, tmp_path):
    _, arch, file = trained
    calls = {
        "main_lincls": (shared_images, *typed("--lr 0.1 0.01 --epochs 1 --protocol moco")),
        "main_semisup": (
            shared_images,
            *typed("--epochs 1 --train-percent 10 --weights finetune --lr-backbone 0.02"),
            *typed("--ft-proj 1 --protocol synco"),
        ),
        "main_knn": (shared_images, *typed("--k 5 --features head")),
        "main_voc07": (write_voc(tmp_path / "voc", 30, 12), "--c", 1),
    }
    count = len(networks.backbone_keys(networks.create(arch, 1, 32)))
    for name, words in calls.items():
        words = (*words, *typed("-b 4 -j 0 --pretrained {}", file))
        status, out, err = script(name, *words, "--save-dir", tmp_path / name)
        assert status == 0, err
        assert f"{count} of {count} backbone tensors matched" in out
        found = json.loads((tmp_path / name / "results.json").read_text())
        assert found["arch"] == arch and all(0 <= x <= 1 for x in found["metrics"].values())


@EACH
def test_export_equals_the_stock_network(trained, call, tmp_path):
    _, arch, file = trained
    out = tmp_path / "out" / "encoder.safetensors"
    status, said, err = call("tools.export", file, out, "--hub")
    assert status == 0, err
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["arch"] == arch
    again, first = pretrained.read(str(out)), pretrained.read(str(file))
    assert (again.arch, again.image_size) == (first.arch, first.image_size) == (arch, 32)
    library = "torchvision" if arch.startswith("torchvision") else "timm"
    assert f"in {library}, features differ by at most" in said
    images = torch.randn(2, 3, 32, 32)
    hubbed = torch.hub.load(str(out.parent), "encoder", source="local")
    with torch.inference_mode():
        torch.testing.assert_close(hubbed(images), first.net(images), atol=1e-4, rtol=1e-4)
        assert torch.equal(again.net(images), first.net(images))


@ONE
def test_report_draws_the_features_of_the_network(trained, call, tmp_path):
    _, arch, file = trained
    status, _, err = call("tools.report", file.parent, "--out", tmp_path / "report.html")
    assert status == 0, err
    page = (tmp_path / "report.html").read_text()
    assert arch in page and "encoder of checkpoint_0000.pth.tar" in page


@ONE
def test_converter_names_the_network_that_it_refuses(trained, tmp_path):
    _, arch, file = trained
    result = shell("detection/convert-pretrain-to-detectron2.py", file, tmp_path / "x.pkl")
    assert result.returncode == 2
    assert f"is of {arch}, but the detectors here are built on ResNets" in result.stderr


@pytest.mark.parametrize("name", ["synco", "sogclr"])
def test_resumed_run_equals_uninterrupted_run(name, script, shared_images, tmp_path):
    module, options, arch, _ = RUNS[name]
    command = (shared_images, *INPUT, *options, *typed("-a {} --epochs 2 -p 1 --keep all", arch))
    for run, more in (
        ("full", ()),
        ("parts", ("--resume", tmp_path / "full/checkpoint_0000.pth.tar")),
    ):
        status, _, err = script(module, *command, *more, "--save-dir", tmp_path / run)
        assert status == 0, err
    a, b = (load(tmp_path / run / "checkpoint_0001.pth.tar") for run in ("full", "parts"))
    for key in ("epoch", "state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    assert facts(tmp_path / "parts") == facts(tmp_path / "full")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    ["convnext_atto", "timm:vit_tiny_patch16_224", "efficientnet_b0", "torchvision:regnet_y_400mf"],
)
def test_killed_run_continues_with_the_same_bits(arch, shared_images, tmp_path):
    command = (
        "main_synco.py",
        shared_images,
        *INPUT,
        *SYNCO,
        *typed("-a {} --epochs 3 -p 1", arch),
    )
    succeeded(shell(*command, "--save-dir", tmp_path / "full"))
    run = tmp_path / "parts"
    words = (*command, "--save-dir", run, "--resume", "auto")
    process = shell(*words, wait=False)
    until(lambda: any(step >= 2 for step in logged(run)), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == STATUS, out + err
    assert "resumed from" in succeeded(shell(*words))
    a, b = (load(tmp_path / name / "checkpoint_0002.pth.tar") for name in ("full", "parts"))
    for key in ("epoch", "state_dict", "optimizer", "progress"):
        assert same(a[key], b[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("name", ["synco", "sogclr"])
def test_run_of_two_processes(name, arch, shared_images, tmp_path):
    script, options, *_ = RUNS[name]
    two = typed("--multiprocessing-distributed --nproc-per-node 2 --device cpu --epochs 1")
    words = (shared_images, *INPUT, *options, "-a", arch, *two, "--save-dir", tmp_path / "run")
    out = succeeded(shell(f"{script}.py", *words))
    none = "the network has no batch norm, so the keys need no shuffle"
    assert (none in out) == (name == "synco" and arch == "test_convnext")
    assert (tmp_path / "run" / "checkpoint_0000.pth.tar").exists()


def test_names_select_one_network_when_a_run_resumes(script, shared_images, tmp_path):
    options = (shared_images, *INPUT, *SYNCO, "--save-dir", tmp_path / "run")
    assert script("main_synco", *options, *typed("-a timm:test_convnext --epochs 1"))[0] == 0
    more = typed("--epochs 2 --resume auto")
    result = script("main_synco", *options, *more, "-a", "mobilenet_v3_small")
    refused(result, "is of arch 'test_convnext', not 'torchvision:mobilenet_v3_small'")
    assert script("main_synco", *options, *more, "-a", "test_convnext")[0] == 0


def test_init_starts_from_torchvisions_names(script, shared_images, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(Trainer, "train", lambda self: found.append(self.task.module))
    net = networks.create("mobilenet_v3_small", 5, 32)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    words = (shared_images, *INPUT, *SYNCO, *typed("-a mobilenet_v3_small --epochs 1"))
    init = ("--init", tmp_path / "weights.pth")
    status, out, err = script("main_synco", *words, *init, "--save-dir", tmp_path / "run")
    assert status == 0, err
    keys = networks.backbone_keys(net)
    assert (
        f"{len(keys)} of {len(keys)} backbone tensors matched; the head classifier.3 is new" in out
    )
    own = net.state_dict()
    for encoder in (found[0].encoder_q, found[0].encoder_k):
        assert all(torch.equal(encoder.state_dict()[key], own[key]) for key in keys)
    status, _, err = script("main_synco", *words, "--init", "timm", "--save-dir", tmp_path / "b")
    refused((status, "", err), "torchvision:mobilenet_v3_small is not a network of timm; give")
    result = script("main_synco", *words, "--init", "torchvision:V9", "--save-dir", tmp_path / "b")
    refused(result, "V9", "IMAGENET1K_V1")


@pytest.fixture
def until_launch(script, images, tmp_path, monkeypatch):
    """Call a script up to the point where processes would start."""
    monkeypatch.setattr(launch, "launch", lambda worker, args: None)
    words = (images, *typed("--image-size 32 -b 8 --save-dir {}", tmp_path / "run"))
    return lambda name, options: script(name, *words, *options.split())


MISTAKES = [
    ("main_synco", "-a torchvision:googlenet", "has auxiliary outputs"),
    ("main_synco", "-a squeezenet1_1", "its last layer is not one linear layer"),
    ("main_synco", "-a timm:levit_128 --image-size 224", "is not one linear layer"),
    ("main_synco", "-a vit_b_32 --image-size 40", "it cannot be created"),
    (
        "main_synco",
        "-a vit_tiny_patch16_224 --image-size 40",
        "--image-size 40: must be a multiple",
    ),
    ("main_sogclr", "-a alexnet", "does not take images of 32 pixels"),
    ("main_fnc", "-a timm:convnext_ato", "the nearest is 'timm:convnext_atto'"),
    ("main_adco", "-a test_convnext --multi-crop", "images of 27 pixels (Calculated padded"),
    ("main_adco", "-a vit_tiny --multi-crop", "next to those of 32 pixels; choose another -a"),
    ("main_adco", "-a swin_tiny --multi-crop", "next to those of 32 pixels; choose another -a"),
    ("main_synco", "-a test_convnext --stem cifar", "is not a torchvision ResNet"),
    ("main_synco", "-a timm:resnet18 --stem cifar", "is not a torchvision ResNet"),
    ("main_synco", "-a mobilenet_v3_small --grad-checkpoint", "does not support recomputing"),
    ("main_fnc", "-a test_efficientnet --grad-checkpoint", "has batch norm"),
    ("main_synco", "-a test_convnext --bn-splits 4", "--bn-splits has no effect: the network has"),
    ("main_adco", "-a test_convnext --bn-splits-query", "--bn-splits-query has no effect"),
    ("main_lincls", "-a mobilenet_v3_small --drop-path 0.1", "has no stochastic depth; leave it"),
    ("main_knn", "-a alexnet", "does not take images of 32 pixels"),
    ("main_moby", "-a mobilenet_v3_small --stop-grad-conv1", "has no patch projection"),
    ("main_moby", "-a mobilenet_v3_small --online-drop-path 0.1", "has no stochastic depth"),
]


@pytest.mark.parametrize(("name", "options", "said"), MISTAKES)
def test_network_that_does_not_fit_is_refused_in_one_line(until_launch, name, options, said):
    refused(until_launch(name, options), said)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("main_synco", "-a test_efficientnet --bn-splits 4 --bn-splits-query"),
        ("main_synco", "-a test_convnext --grad-checkpoint --bn-splits 8"),
        ("main_adco", "-a mobilenet_v3_small --multi-crop --bn-splits 4"),
        ("main_adco", "-a test_efficientnet --multi-crop"),
        ("main_lincls", "-a efficientnet_b0 --drop-path 0.1 --weights finetune --protocol moco"),
    ],
)
def test_network_that_fits_is_accepted(until_launch, name, options):
    status, _, err = until_launch(name, options)
    assert (status, err) == (0, "")


def test_default_run_folder_has_no_colon(script, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    monkeypatch.setattr(launch, "launch", lambda worker, c: folders.append(c.run.save_dir))
    words = typed("{} -a torchvision:mobilenet_v3_small --image-size 32 -b 8", images)
    assert script("main_synco", *words)[0] == 0
    assert folders[0].startswith("runs/synco-torchvision-mobilenet_v3_small-")
