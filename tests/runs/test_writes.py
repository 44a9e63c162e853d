"""No tool or script replaces a file; every call that writes one is listed here."""

import ast
import hashlib
import re
from pathlib import Path

import pytest
from conftest import ROOT, shell
from run_helpers import digests, evaluation, refused, succeeded, typed

pytestmark = pytest.mark.slow


def tool_commands(run: Path, out: Path) -> dict[str, tuple]:
    """Return a command of each tool that writes, by the name of the file that it writes."""
    checkpoint = run / "checkpoint_0000.pth.tar"
    return {
        "report.html": ("tools/report.py", run, "--images", 20, "--out", out / "report.html"),
        "views.png": (
            "tools/show_views.py",
            "mocov2",
            "photos",
            *typed("--images 1 --out {}", out / "views.png"),
        ),
        "schedule.png": (
            "tools/schedule.py",
            "configs/lincls_moco.yaml",
            *("--plot", out / "schedule.png"),
        ),
        "negatives.html": (
            "tools/negatives.py",
            checkpoint,
            "photos",
            *typed("--images 20 --queries 4 --out {}", out / "negatives.html"),
        ),
        "encoder.pth": ("tools/export.py", checkpoint, out / "encoder.pth"),
        "table.md": ("tools/collect.py", run, "--out", out),
        "weights.pkl": (
            "detection/convert-pretrain-to-detectron2.py",
            checkpoint,
            out / "weights.pkl",
        ),
    }


@pytest.mark.parametrize(
    "name",
    "report.html views.png schedule.png negatives.html encoder.pth table.md weights.pkl".split(),
)
def test_a_tool_replaces_no_file(name, script, shared_images, run, tmp_path):
    if name == "table.md":
        command = evaluation("main_knn", shared_images, run / "checkpoint_0000.pth.tar")
        assert script(*command, "--save-dir", run)[0] == 0
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    command = tool_commands(run, out)[name]
    result = shell(*command)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert f"{out / name}: exists; give --force to replace it" in result.stderr
    assert digests(out) == {name: hashlib.sha256(b"precious").hexdigest()}
    succeeded(shell(*command, "--force"))
    assert (out / name).read_bytes() != b"precious"


def test_features_are_not_dumped_over_others(script, shared_images, run, tmp_path):
    dump = tmp_path / "features"
    command = (
        *evaluation("main_knn", shared_images, run / "checkpoint_0000.pth.tar"),
        "--dump-features",
        dump,
    )
    assert script(*command, "--save-dir", tmp_path / "one")[0] == 0
    before = digests(dump)
    refused(script(*command, "--save-dir", tmp_path / "two"), "holds features", "--load-features")
    assert digests(dump) == before
    (dump / "meta.json").unlink()
    refused(
        script(*command, "--save-dir", tmp_path / "two"), "holds an unfinished dump of features"
    )


# Every call that makes, replaces, renames or removes a file, and why it cannot harm another run.
WRITES = {
    "moco/files.py": "replacing and creating, which the others use",
    "moco/engine/run_folder.py": "the lock of a folder, and folders in which nothing was written",
    "moco/engine/record.py": "status.json in the run's own folder, after claim",
    "moco/launch/output.py": "/dev/null",
    "moco/user.py": "this user's own folder for temporary files",
    "moco/engine/log.py": "a run's own folder, after claim",
    "moco/engine/board.py": "TensorBoard's events in the run's own folder, after claim",
    "moco/engine/tracking.py": "tracking.log in the run's own folder, after claim",
    "moco/engine/trackers.py": "the tracker's files in the run's own folder, after claim",
    "moco/engine/checkpoint.py": "a run's own folder, after claim",
    "moco/engine/trainer.py": "args.yaml in the run's own folder, after claim",
    "moco/engine/pretrain.py": "superseded checkpoints of the run itself, after claim",
    "moco/evaluate/results.py": "results.json in the run's own folder, after claim",
    "moco/evaluate/feature_files.py": "a folder for --dump-features that check_dump found "
    "without features",
    "moco/data/photos.py": "the cache folder",
    "moco/data/registry.py": "the cache folder",
    "moco/data/subsets.py": "the cache folder",
    "tools/collect.py": "creating",
    "moco/report/markup.py": "creating",
    "moco/cli/rebuild.py": "a temporary folder",
    "tools/show_views.py": "creating",
    "tools/schedule.py": "creating",
    "tools/convert_tf.py": "creating",
    "moco/api.py": "replacing",
    "moco/data/tar_index.py": "replacing, next to the tar files or in the cache folder",
    "moco/evaluate/feature_parts.py": "the folder OUT.parts, which is locked",
    "moco/evaluate/feature_tables.py": "the open file of tools/embed.py",
    "tools/embed.py": "check_new, then replacing",
    "tools/parquet_to_tar.py": "a new folder, or one of its own; replacing",
    "tools/export.py": "a temporary folder, then creating",
    "moco/encoder/exported.py": "tensors in memory",
    "moco/report/plots.py": "a picture in memory",
    "tools/pictures.py": "check_new, then creating",
    "tools/demo.py": "a folder that new_folder has made",
    "detection/convert-pretrain-to-detectron2.py": "creating",
    "detection/train_net.py": "OUTPUT_DIR, after take",
}
CALLS = set(
    "write_text write_bytes touch unlink rmtree rename replace mkdir savefig open_memmap"
    " SummaryWriter remove rmdir"
    " replacing creating write_json write_options copyfile copytree move link symlink".split()
)
LIBRARIES = {
    "torch": {"save"},
    "np": {"save", "savez"},
    "pickle": {"dump"},
    "json": {"dump"},
    "yaml": {"dump"},
}


def writing(call: ast.Call) -> bool:
    """Return whether a call may change a file."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "open":
        modes = [
            a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        return any(re.fullmatch(r"[wax]b?\+?|r\+b?|rb\+", mode) for mode in modes)
    of = getattr(getattr(function, "value", None), "id", "")
    if name in LIBRARIES.get(of, ()):
        return True
    if (
        name == "replace"
    ):  # of a path, which has one argument, or of os; not of a string or a dataclass
        return of == "os" or (len(call.args) == 1 and not call.keywords)
    return name in CALLS


def test_every_place_that_writes_is_known():
    folders = [
        path
        for folder in ("moco", "tools", "detection")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = set()
    for path in (*folders, *ROOT.glob("main_*.py")):
        calls = (
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        )
        if any(map(writing, calls)):
            found.add(str(path.relative_to(ROOT)))
    assert found == WRITES.keys()
