"""tools/export.py: exported encoders load strictly in other software, with the same features."""

import os
import resource
import runpy

import pytest
import timm
import torch
import torchvision
from conftest import ROOT, shell
from encoder_helpers import SMALL as TEST_VIT
from encoder_helpers import to_moby_name
from export_helpers import features, network, printed, saved, saved_resnet, tool_caller
from run_helpers import SMALL as RESNET
from run_helpers import refused
from safetensors import safe_open
from safetensors.torch import load_file

from moco.encoder import archs, stock
from moco.encoder.stock import StockModel
from tools import export

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, capsys):
    return tool_caller(export, monkeypatch, capsys)


@pytest.fixture
def resnet(tmp_path):
    return saved_resnet(tmp_path)


@pytest.mark.parametrize(
    ("script_name", "options", "prefix", "method", "create_stock"),
    [
        (
            "main_synco",
            (*RESNET, "--mlp"),
            "module.encoder_q.",
            "moco",
            torchvision.models.resnet18,
        ),
        (
            "main_moby",
            TEST_VIT,
            "module.encoder.",
            "moby",
            lambda: timm.create_model("test_vit", img_size=32, num_classes=0),
        ),
    ],
)
def test_checkpoint_of_this_project_is_exported(
    script_name, options, prefix, method, create_stock, script, run, shared_images, tmp_path
):
    status, _, err = script(script_name, shared_images, *options, "--save-dir", tmp_path / "run")
    assert status == 0, err
    file = tmp_path / "run" / "checkpoint_0000.pth.tar"
    status, out, err = run(file, tmp_path / "new" / "encoder.safetensors")
    assert status == 0, err
    state = torch.load(file, weights_only=True)["state_dict"]
    written = load_file(tmp_path / "new" / "encoder.safetensors")
    net = create_stock()
    net.fc = torch.nn.Identity()
    net.load_state_dict(written)
    assert all(torch.equal(tensor, state[prefix + name]) for name, tensor in written.items())
    with safe_open(tmp_path / "new" / "encoder.safetensors", "pt") as opened:
        facts = opened.metadata()
    assert facts["method"] == method and facts["epoch"] == "1" and facts["image_size"] == "32"
    assert facts["source"] == "checkpoint_0000.pth.tar" and facts["arch"] in out
    assert os.listdir(tmp_path / "new") == ["encoder.safetensors"]
    hubbed = torch.hub.load(str(ROOT), "encoder", str(file), source="local")
    for other in (hubbed, *printed(out)):
        assert not other.training
        torch.testing.assert_close(features(other), features(net.eval()))


@pytest.mark.parametrize("arch", ["resnet50", "vit_small", "convnext_atto"])
def test_each_architecture_is_exported(arch, run, tmp_path):
    net = network(arch, 64)
    file = saved(
        tmp_path / "x.pth.tar", net, "module.base_encoder.", arch=arch, args={"image_size": 64}
    )
    status, out, err = run(file, tmp_path / "x.pth")
    assert status == 0, err
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    assert written.keys() == net.state_dict().keys()
    made = printed(out)
    assert len(made) == (2 if arch in archs.ARCHS else 1)
    for other in made:
        torch.testing.assert_close(features(other, 64), features(net, 64), rtol=1e-4, atol=1e-4)
    assert ("num_heads=12" in out) == (arch == "vit_small")


def test_swins_and_positions_of_other_software_are_converted(run, tmp_path):
    """Names become timm's. Interpolated positions are announced."""
    theirs = network("swin_tiny")
    model = {to_moby_name(name): tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"model": model}, tmp_path / "moby.pth")
    status, out, err = run(
        tmp_path / "moby.pth", tmp_path / "swin.pt", "-a", "swin_tiny", "--image-size", 32
    )
    assert status == 0 and "interpolated" not in out, err
    torch.testing.assert_close(features(printed(out)[0]), features(theirs))
    file = saved(
        tmp_path / "v3.pth.tar", network("vit_tiny", 64), "module.base_encoder.", arch="vit_tiny"
    )
    status, out, err = run(file, tmp_path / "vit.pt", "--image-size", 96)
    assert (
        status == 0 and "interpolated to images of 96 pixels (--image-size): pos_embed\n" in out
    ), err
    assert printed(out)[0].pos_embed.shape == (1, 37, 192)


# torch.hub


@pytest.mark.parametrize("name", ["a 'b' {c}.pth", "encoder.safetensors"])
def test_folder_for_torch_hub_loads(name, run, resnet, tmp_path):
    net, file = resnet
    status, out, err = run(file, tmp_path / "hub" / name, "--hub")
    assert status == 0 and "torch.hub.load(" in out, err
    moved = (tmp_path / "hub").rename(tmp_path / "elsewhere")
    assert sorted(os.listdir(moved)) == sorted(["hubconf.py", name])
    # torch.hub offers every callable whose name has no leading underscore
    for folder in (moved, ROOT):
        entries = runpy.run_path(str(folder / "hubconf.py")).items()
        assert [
            name for name, entry in entries if callable(entry) and not name.startswith("_")
        ] == ["encoder"]
    found = torch.hub.load(str(moved), "encoder", source="local")
    assert not found.training and torch.equal(features(found), features(net))
    raw = torch.hub.load(str(moved), "encoder", source="local", pretrained=False)
    assert raw.state_dict().keys() == net.state_dict().keys() and not torch.equal(
        features(raw), features(net)
    )


def test_hub_folder_works_without_this_project(run, resnet, tmp_path):
    status, _, err = run(resnet[1], tmp_path / "hub" / "x.pth", "--hub")
    assert status == 0, err
    code = (
        "import sys, torch; net = torch.hub.load(sys.argv[1], 'encoder', source='local');"
        "print(type(net), {'moco', 'timm', 'safetensors'} & sys.modules.keys())"
    )
    found = shell("-c", code, tmp_path / "hub")
    assert found.returncode == 0 and "torchvision.models.resnet.ResNet" in found.stdout, (
        found.stderr
    )
    assert "set()" in found.stdout


def test_text_in_a_checkpoint_never_becomes_code(run, tmp_path):
    evil = '"""\nraise SystemExit("run")\n{0}\'\\'
    file = saved(
        tmp_path / "x.pth.tar",
        network("resnet18"),
        arch="resnet18",
        method=evil,
        epoch="many",
        args=["odd"],
    )
    status, _, err = run(file, tmp_path / "hub" / "x.pth", "--hub")
    assert status == 0, err
    torch.hub.load(str(tmp_path / "hub"), "encoder", source="local")
    refused(
        run(saved(file, network("resnet18"), arch="os.system('x')"), tmp_path / "y.pth"),
        "unknown arch",
    )


# errors leave nothing behind, and overwrite nothing


def test_different_features_are_an_error_and_leave_no_file(run, tmp_path, monkeypatch):
    """With six heads instead of twelve every tensor fits, but the features differ."""
    file = saved(
        tmp_path / "x.pth.tar",
        network("vit_small"),
        "module.encoder.",
        arch="vit_small",
        args={"image_size": 32},
    )
    six = "net = timm.create_model('vit_small_patch16_224', num_classes=0, img_size=32)"
    monkeypatch.setattr(stock, "stock_models", lambda *_: [StockModel("timm", (six,))])
    refused(
        run(file, tmp_path / "new" / "x.pth", "--hub"),
        "the features of timm's network differ",
        "nothing was written",
    )
    assert not os.listdir(tmp_path / "new")


def test_diverged_encoder_is_refused(run, tmp_path):
    net = network("resnet18")
    with torch.no_grad():
        net.conv1.weight[0, 0, 0, 0] = torch.nan
    refused(
        run(saved(tmp_path / "x.pth.tar", net, arch="resnet18"), tmp_path / "x.pth"),
        "not finite",
        "earlier",
    )
    assert os.listdir(tmp_path) == ["x.pth.tar"]


def test_existing_files_stay_unless_forced(run, resnet, tmp_path):
    _, file = resnet
    (tmp_path / "new").mkdir()
    out, hub = tmp_path / "new" / "x.pth", tmp_path / "new" / "hubconf.py"
    hub.write_text("mine")
    refused(run(file, out, "--hub"), "hubconf.py: exists; give --force")
    assert os.listdir(out.parent) == ["hubconf.py"]
    out.write_text("mine")
    refused(run(file, out), "x.pth: exists; give --force")
    assert out.read_text() == hub.read_text() == "mine"
    assert run(file, out, "--force")[0] == 0 and hub.read_text() == "mine"
    assert len(torch.load(out, weights_only=True)) == 120
    refused(run(out, out, "-a", "resnet18", "--force"), "is the checkpoint itself")
    assert len(torch.load(out, weights_only=True)) == 120


def test_full_disk_leaves_no_file(run, resnet, tmp_path):
    """A limit on file sizes stands in for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, before[1]))
    try:
        result = run(resnet[1], tmp_path / "new" / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "x.safetensors: cannot be written (File too large)")
    assert not os.listdir(tmp_path / "new")


def test_errors_are_one_line(run, resnet, tmp_path):
    _, file = resnet
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pth").mkdir()
    bare = saved(tmp_path / "bare.pth", network("resnet18"), "")
    vit = saved(
        tmp_path / "vit.pth",
        network("vit_tiny"),
        "module.encoder.",
        arch="vit_tiny",
        args={"image_size": 32},
    )
    out = tmp_path / "out.pth"
    for options, words in (
        ((tmp_path / "none.pth", out), ("none.pth: no such checkpoint",)),
        ((tmp_path / "file", out), ("not a readable checkpoint",)),
        ((file, tmp_path / "out.pth.tar"), ("let OUT end in .pth, .pt, .safetensors",)),
        ((file, tmp_path / "folder.pth"), ("is a folder",)),
        ((file, tmp_path / "file" / "out.pth"), ("cannot be written",)),
        ((file, out, "-a", "resnet50"), ("contains resnet18, not resnet50; give -a resnet18",)),
        ((file, out, "-a", "resnet51"), ("the nearest is 'resnet",)),
        ((bare, out), ("does not fit", "resnet50 was tried: give another -a ARCH")),
        ((vit, out, "--image-size", 40), ("--image-size 40", "multiple")),
        ((vit, out, "-a", "resnet18"), ("contains vit_tiny, not resnet18",)),
    ):
        refused(run(*options), *words)
    latin = tmp_path / os.fsdecode(b"\xe9.safetensors")
    refused(run(file, latin), "is not UTF-8, which safetensors needs")
    assert not list(tmp_path.glob("*out*")) and not latin.exists()
    source = file.with_name(os.fsdecode(b"\xe9.pth.tar"))
    source.write_bytes(file.read_bytes())
    assert run(source, tmp_path / "good.safetensors")[0] == 0
    with pytest.raises(SystemExit, match="2"):
        run(bare, out, "--image-size", "0")
