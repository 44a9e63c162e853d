"""Loading transformers from checkpoints of other software."""

import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from encoder_helpers import to_moby_name
from run_helpers import typed

from moco.encoder import networks, pretrained, timm_networks
from moco.engine import checkpoint
from moco.errors import InputError


def test_checkpoint_of_mobys_own_code_loads(tmp_path, script, shared_images):
    torch.manual_seed(1)
    theirs = networks.create("swin_tiny", 0, 32)
    model = {to_moby_name(name): tensor for name, tensor in theirs.state_dict().items()}
    assert (
        "encoder.layers.0.downsample.reduction.weight" in model
        and "encoder.layers.3.downsample.norm.weight" not in model
    )
    model |= {
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49),
        "queue1": torch.zeros(256, 4096),
    }
    model |= {
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(
            49, 49, dtype=torch.long
        )
    }
    model |= {
        name.replace("encoder.", "encoder_k."): tensor
        for name, tensor in model.items()
        if name.startswith("encoder.")
    }
    model |= {"projector.linear_out.weight": torch.zeros(256, 4096)}
    torch.save({"model": model, "epoch": 299}, tmp_path / "ckpt_epoch_299.pth")
    ours = networks.create("swin_tiny", 3, 32)
    count = len(networks.backbone_keys(ours))
    assert pretrained.load_backbone(ours, model, "file") == count
    assert all(
        torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items()
    )
    options = (
        *typed("--pretrained {} -a swin_tiny --image-size 32", tmp_path / "ckpt_epoch_299.pth"),
        *typed("-b 8 -j 0"),
    )
    status, out, err = script(
        "main_knn", shared_images, *options, "--k", 5, "--save-dir", tmp_path / "knn"
    )
    assert status == 0 and f"{count} of {count} backbone tensors matched" in out, err
    del model["encoder.layers.2.blocks.3.mlp.fc1.weight"]
    with pytest.raises(
        InputError, match=r"missing tensors \(1\): layers\.2\.blocks\.3\.mlp\.fc1\.weight"
    ):
        pretrained.load_backbone(ours, model, "file")
    with pytest.raises(InputError, match=r"vit\.pt"):
        pretrained.load_backbone(networks.create("vit_tiny", 3, 32), model, "vit.pt")


def test_positions_are_interpolated_to_the_image_size():
    small, large = networks.create("vit_tiny", 3, 64), networks.create("vit_tiny", 3, 96)
    with torch.no_grad():
        small.pos_embed.normal_()
    pretrained.load_backbone(
        large, {f"encoder.{name}": tensor for name, tensor in small.state_dict().items()}, "file"
    )
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    grid = small.pos_embed[:, 1:].transpose(1, 2).view(1, 192, 4, 4)
    wider = (
        F.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False)
        .flatten(2)
        .transpose(1, 2)
    )
    torch.testing.assert_close(
        large.pos_embed, torch.cat([small.pos_embed[:, :1], wider], 1), rtol=0, atol=1e-5
    )


def test_another_architecture_with_the_same_names_is_not_loaded():
    """One has the same shapes but six heads, another one has patches of another size."""
    theirs = timm.create_model("vit_small_patch16_224", img_size=32).state_dict()
    with pytest.raises(
        InputError, match=r"f\.pt: its positions are learned, .* -a vit_small_patch16_224"
    ):
        pretrained.load_backbone(networks.create("vit_small", 3, 32), theirs, "f.pt")
    assert (
        pretrained.load_backbone(networks.create("vit_small_patch16_224", 3, 32), theirs, "f.pt")
        == 150
    )
    mine = networks.create("vit_small", 3, 64)
    for row_first in (True, False):
        table = timm_networks.sine_positions(2, 2, 384)
        theirs["pos_embed"][0, 1:] = (
            table if row_first else table.view(2, 2, 384).transpose(0, 1).reshape(4, 384)
        )
        assert pretrained.load_backbone(mine, theirs, "f.pt") == 150
    finer = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8).state_dict()
    with pytest.raises(
        InputError,
        match=r"wrong shapes \(1\): patch_embed\.proj\.weight is \(192, 3, 8, 8\), "
        r"expected \(192, 3, 16, 16\)",
    ):
        pretrained.load_backbone(networks.create("vit_tiny", 3, 32), finer, "f.pt")


def test_file_with_settings_of_yacs_is_read(tmp_path):
    """CfgNode is a dict with attributes. Reading it imports and runs nothing."""
    module = types.ModuleType("yacs.config")
    node = module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = node(MODEL=node(TYPE="moby"), EPOCHS=300)
    settings.__dict__["__immutable__"] = True
    state = {"model": {"encoder.x": torch.ones(2)}, "epoch": 299, "config": settings}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        torch.save(state, tmp_path / "ckpt_epoch_299.pth")
    found = checkpoint.load(str(tmp_path / "ckpt_epoch_299.pth"))
    assert torch.equal(found["model"]["encoder.x"], torch.ones(2))
    assert found["config"]["MODEL"]["TYPE"] == "moby" and found["config"]["EPOCHS"] == 300
