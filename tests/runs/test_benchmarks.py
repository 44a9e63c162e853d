"""The benchmarks run at small sizes and write what they promise. No test asserts a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, shell, write_images
from run_helpers import typed

pytestmark = pytest.mark.slow


def run(name: str, tmp_path, *options: object) -> dict:
    result = shell(
        f"benchmarks/{name}.py", "--rounds", 1, "--json", tmp_path / "result.json", *options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.parametrize("counts", [(8, 8, 8, 4, 4, 4), (8, 0, 8, 0, 0, 0)])
def test_negatives(tmp_path, counts):
    """Run it; the script fails if a head's loss or gradient differs from ours."""
    sizes = (*typed("--n 8 --k 32768 --dim 32 --n-hard 64 --counts"), *counts, "--device", "cpu")
    found = run("negatives", tmp_path, *sizes)
    assert {
        "synco_over_moco",
        "synco_parts_over_moco",
        "loop_extra_over_ours_extra",
        "explicit_memory_over_ours",
    } < found.keys()
    memory = {row["head"]: row["MiB"] for row in found["rows"]}
    bank = 8 * 32768 * 4 / 2**20  # one [N, K] buffer
    assert memory["moco"] < bank < memory["synco"] < memory["explicit"]
    assert 2 * bank < memory["plain"]
    assert found["moco_over_floor"] > 0 and found["targets"]["moco_over_floor"]["limit"] == 1.3


def test_false_negatives(tmp_path):
    """The script itself compares our loss and gradient with the plain ones."""
    sizes = typed("--views 4 --images 16 --rows 4096 --dim 16 --chunk 8 --device cpu")
    found = run("false_negatives", tmp_path, *sizes)
    assert found["plain_memory_over_ours"] > 4 and found["plain_over_ours"] > 0
    assert (
        found["half_the_chunk_memory"] < 0.7
        and max(found["half_the_views_memory"], found["twice_the_images_memory"]) < 1.3
    )
    assert len(found["rows"]) == 5


def test_startup(tmp_path):
    found = run("startup", tmp_path, "--files", 300, "--classes", 3)
    assert found["torchvision_over_ours"] > 0 and found["files"] == 300


def test_names(tmp_path):
    found = run("names", tmp_path, "--names", 3000, "--compared", 2000)
    assert [(row["names"], row["kind"]) for row in found["rows"][::2]] == [
        ("2,000", "python list"),
        ("2,000", "ours"),
        ("3,000", "ours"),
    ]
    assert found["targets"].keys() == {"seconds", "GiB"} and found["seconds"] > 0 < found["GiB"]


def test_probe(tmp_path, shared_images):
    """The script itself fails where a head's accuracy is not that of a run with its rate alone."""
    found = run("probe", tmp_path, "--data", shared_images, "--size", 32, "--epochs", 1)
    assert {row["probe"] for row in found["rows"]} == {"one rate", "five rates"} and found[
        "five_over_one"
    ] > 0


def test_loader(tmp_path):
    found = run("loader", tmp_path, "--images", 2, "--size", 64)
    assert {"host_over_pil", "cpu_over_pil"} < found.keys()
    assert {"host", "cpu", "pil", "v2"} <= {row["pipeline"] for row in found["rows"]}
    low, high = map(int, found["KB"].split("-"))
    assert 80 <= low <= high <= 110


def test_loader_with_large_images(tmp_path):
    found = run("loader", tmp_path, "--large", "--images", 1, "--size", 64)
    names = [row["pipeline"] for row in found["rows"]]
    assert names[:2] == ["off", "on"] and names[-2:] == ["torchvision", "pillow"]
    assert found["on_over_off"] > 1


@pytest.mark.parametrize("from_files", [False, True])
def test_loader_with_small_images(tmp_path, from_files):
    files = (
        ("--data", write_images(tmp_path / "images", classes=2, train=20, size=32))
        if from_files
        else ()
    )
    found = run("loader", tmp_path, "--small", "--images", 40, "--batch", 16, *files)
    assert found["images"] == 32 and found["ours_over_pil"] > 0
    assert [row["pipeline"] for row in found["rows"]] == ["ours", "pil", "crops", "colors"]


def test_loader_with_shards(tmp_path):
    found = run("loader", tmp_path, *typed("--shards --images 40 --size 64"))
    forms, kinds = ("files", "tar", "arrow", "parquet"), ("warm", "cold")
    rows = {(row["form"], row["what"], row["cache"]) for row in found["rows"]}
    assert rows == {(f, what, kind) for f in forms for what in ("read", "views") for kind in kinds}
    assert all(row["images/s"] > 0 for row in found["rows"])
    names = {f"tar_over_files_{what}_{kind}" for what in ("read", "views") for kind in kinds}
    assert names < found.keys() and found["parquet_over_tar_read_warm"] > 0


def test_step(tmp_path):
    """The script itself compares our losses with plain MoCo's."""
    found = run(
        "step", tmp_path, *typed("--arch resnet18 --size 32 --batch 8 --k 2048 --processes 1 2")
    )
    ratios = {
        f"{name}{suffix}"
        for name in ("synco_over_moco", "adco_over_moco", "ours_over_plain")
        for suffix in ("", "_2_processes")
    }
    assert ratios < found.keys()
    assert len(found["rows"]) == 8 and all(row["ms"] > 0 for row in found["rows"])


def test_ddp(tmp_path):
    found = run("ddp", tmp_path, *typed("--size 32 --batch 4"))
    rows = {row["DDP"]: row for row in found["rows"]}
    assert rows["bf16"]["gradient MB"] == rows["views"]["gradient MB"] / 2
    for name, row in rows.items():
        assert row["ms"] > 0 and (row["SyncBN calls"] == 0) == (name == "no SyncBN")
        if name != "no exchange":  # its gradients are wrong
            low, high = (1e-3, 0.1) if name == "bf16" else (0, 1e-4)
            assert low <= row["error"] < high
    assert {"views_over_default", "bf16_over_views", "SyncBN_over_BN"} < found.keys()


def test_memory(tmp_path):
    file, words = tmp_path / "result.json", typed("--arch vit_tiny --blocks 12 --size 32")
    result = shell("benchmarks/memory.py", *words, "--json", file)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["mib_per_image_off_grad_checkpoint"] < found["mib_per_image_off"] / 3
    assert found["mib_per_image_bf16"] < found["mib_per_image_off"]
    each = found["parameters_millions"] * 4e6 / 2**30
    assert 5.8 * each < found["fixed_gib"] < 6 * each  # the predictor has no moving average


def test_threads(tmp_path):
    sizes = ("--steps", 1, "--size", 32, "--batch-size", 2, "--settings", "torch's default", "ours")
    found = run("threads", tmp_path, *sizes)
    assert [(row["setting"], row["where"]) for row in found["rows"]] == [
        (setting, where)
        for where in ("alone", "next to 2")
        for setting in ("torch's default", "ours", "one thread")
    ]
    assert all(row["images/s"] > 0 for row in found["rows"])


def test_methods(script, tmp_path, monkeypatch, capsys):
    """The scripts that it starts run in this process, which has imported all there is."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    def here(command: list[str], **_: object) -> subprocess.CompletedProcess:
        status, _, err = script(Path(command[1]).stem, *command[2:])
        assert status == 0, err
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", here)
    file = tmp_path / "methods.json"
    short = (
        *typed("--methods mochi --seeds 0 --short --out {} --json {}", tmp_path / "runs", file),
    )
    monkeypatch.setattr(sys, "argv", ["methods.py", *map(str, short)])
    methods.main()
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    names = {"random_knn", "knn", "random_linear", "linear", "semisup_random", "semisup"}
    assert found.keys() == {"mochi"} and found["mochi"].keys() == {*names, "seconds"}
    assert all(0 < found["mochi"][name] < 1 for name in names) and found["mochi"]["seconds"] > 1
    assert "mochi" in out.splitlines()[-2]


def test_family(tmp_path):
    """Train two methods for one epoch each, and continue with a second seed of one of them."""
    words = (*typed("benchmarks/family.py --epochs 1 --out {}", tmp_path / "out"), "--methods")
    first = shell(*words, "mocov2", "simclr", "--json", tmp_path / "first.json")
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "first.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["mocov2", "simclr"]
    for row in found["rows"]:
        assert 0 < row["knn_before"] < 1 and 0 < row["knn"] < 1
        assert min(row["seconds"], row["images_per_s"]) > 0
        assert 2**27 < row["memory"] < 2**35
    again = shell(*words, "simclr", "--seeds", 0, 1, "--json", tmp_path / "again.json")
    assert again.returncode == 0 and again.stdout.count("(an earlier call)") == 1, again.stdout
    runs = json.loads((tmp_path / "again.json").read_text())["runs"]["simclr"]
    assert runs[0] == found["runs"]["simclr"][0] and runs[1]["seed"] == 1
    assert "± " in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "family.png").stat().st_size > 5000


def test_faults(tmp_path):
    """Run it; the script fails if a stopped run and the one never stopped end with other bits."""
    short = (
        *typed("--methods sogclr --processes 1 --signals KILL --stops 2 --epochs 1"),
        "--batch-size",
        32,
    )
    result = shell("benchmarks/faults.py", *short, "--json", tmp_path / "faults.json")
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "faults.json").read_text())
    assert found["same"] is True and found["stops"] == 2
