"""A run folder belongs to one run: no other run, evaluation or tool changes a file in it."""

import ast
import contextlib
import hashlib
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, shell
from dataset_trees import write_voc
from run_helpers import VOC_SMALL, load, refused, succeeded

import main_synco
from moco.config import Config, Evaluation, Pretraining, replaced
from moco.engine import resume, run_folder
from moco.errors import InputError

pytestmark = pytest.mark.slow

SMALL = ("-a", "resnet18", "--image-size", 32, "-b", 8, "-j", 0)
PRETRAIN = (*SMALL, "--moco-k", 32)


def digests(folder: Path, below: bool = True) -> dict[str, str]:
    """Return the hash of each file by its path, without locks.

    Unless `below`, subfolders are left out.
    """
    files = folder.rglob("*") if below else folder.glob("*")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and path.name != run_folder.LOCK
    }


@pytest.fixture(scope="module")
def pretrained(shared_images, tmp_path_factory):
    from conftest import in_process

    run = tmp_path_factory.mktemp("pretrained") / "run"
    status, _, err = in_process(
        "main_synco", shared_images, *PRETRAIN, "--epochs", 1, "--save-dir", run
    )
    assert status == 0, err
    return run


@pytest.fixture
def run(pretrained, tmp_path):
    """A pre-training's run folder, which a test may write to."""
    subprocess.run(["cp", "-r", pretrained, tmp_path / "run"], check=True)
    return tmp_path / "run"


# evaluations


def evaluation(name: str, data: Path, checkpoint: Path) -> tuple:
    """Return a short command of the evaluation script `name`."""
    options = {
        "main_knn": ("--k", 1, "-b", 8, "-j", 0),
        "main_lincls": ("--lr", 0.1, "--epochs", 1, "-b", 8, "-j", 0),
        "main_semisup": ("--train-percent", 100, "--epochs", 1, "-b", 8, "-j", 0),
    }
    return (name, data, "--pretrained", checkpoint, *options[name])


EVALUATIONS = ("main_knn", "main_lincls", "main_semisup")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_changes_nothing_of_another_run(name, script, shared_images, run, tmp_path):
    command = evaluation(name, shared_images, run / "checkpoint_0000.pth.tar")
    short = name.removeprefix("main_")
    before = digests(run)
    for subfolder in (short, f"{short}-2"):
        status, out, err = script(*command, "--save-dir", run)
        assert status == 0, err
        assert f"{run} holds another run; this one writes to {run / subfolder}" in out
        after = digests(run)
        assert {path: after[path] for path in before} == before
        assert f"{subfolder}/results.json" in after and f"{subfolder}/args.yaml" in after
        assert all(path in before or path.startswith(f"{subfolder}/") for path in after)
        before = after
    # in a folder of its own, another evaluation's, and its own once more
    folder = tmp_path / "own"
    for other in (name, *EVALUATIONS):
        before = digests(folder)
        command = evaluation(other, shared_images, run / "checkpoint_0000.pth.tar")
        assert script(*command, "--save-dir", folder)[0] == 0
        assert {
            path: digest for path, digest in digests(folder).items() if path in before
        } == before


def test_voc07_changes_nothing_of_another_run(script, run, tmp_path):
    tree = write_voc(tmp_path / "voc")
    command = (
        "main_voc07",
        tree,
        *VOC_SMALL,
        "--pretrained",
        run / "checkpoint_0000.pth.tar",
        "--save-dir",
        run,
    )
    for subfolder in ("voc07", "voc07-2"):
        before = digests(run)
        status, out, err = script(*command)
        assert status == 0, err
        assert f"writes to {run / subfolder}" in out
        assert {path: digest for path, digest in digests(run).items() if path in before} == before


def test_a_pretraining_does_not_start_in_a_folder_of_another_run(
    script, shared_images, run, tmp_path
):
    before = digests(run)
    refused(
        script("main_synco", shared_images, *PRETRAIN, "--save-dir", run),
        "holds another run",
        "--resume auto",
    )
    assert digests(run) == before
    results = tmp_path / "evaluated"
    command = evaluation("main_knn", shared_images, run / "checkpoint_0000.pth.tar")
    assert script(*command, "--save-dir", results)[0] == 0
    before = digests(results)
    for again in ((), ("--resume", "auto")):
        refused(
            script("main_synco", shared_images, *PRETRAIN, "--save-dir", results, *again),
            "holds another run",
        )
    assert digests(results) == before


def test_an_evaluation_in_a_subfolder_resumes_there(script, shared_images, run):
    command = evaluation("main_lincls", shared_images, run / "checkpoint_0000.pth.tar")
    assert script(*command, "--save-dir", run, "--resume", "auto")[0] == 0
    before = digests(run, below=False)
    status, out, err = script(*command, "--save-dir", run, "--resume", "auto", "--epochs", 2)
    assert status == 0, err
    assert f"resumed from {run / 'lincls' / 'checkpoint.pth.tar'} at epoch 1" in out
    assert load(run / "lincls" / "checkpoint.pth.tar")["epoch"] == 2
    assert not (run / "lincls-2").exists() and digests(run, below=False) == before


def test_a_test_of_a_classifier_leaves_its_run_as_it_is(script, shared_images, run, tmp_path):
    command = evaluation("main_lincls", shared_images, run / "checkpoint_0000.pth.tar")
    own = tmp_path / "own"
    assert script(*command, "--save-dir", own)[0] == 0
    before = digests(own)
    status, _, err = script(
        "main_lincls", shared_images, "-e", "--resume", "auto", "--save-dir", own, "-b", 8, "-j", 0
    )
    assert status == 0, err
    assert {path: digest for path, digest in digests(own).items() if path in before} == before
    metrics = [
        json.loads((place / "results.json").read_text())["metrics"]
        for place in (own, own / "lincls")
    ]
    assert metrics[0] == metrics[1]
    status, out, err = script(*command, "--save-dir", own, "--resume", "auto", "--epochs", 2)
    assert status == 0 and f"resumed from {own / 'checkpoint.pth.tar'} at epoch 1" in out, err


def test_results_of_a_finished_classifier_stay(script, shared_images, run, tmp_path):
    command = (
        *evaluation("main_lincls", shared_images, run / "checkpoint_0000.pth.tar"),
        "--save-dir",
        tmp_path / "own",
    )
    assert script(*command, "--epochs", 2)[0] == 0
    before = digests(tmp_path / "own")
    status, out, err = script(*command, "--resume", "auto", "--epochs", 1)
    assert status == 0, err
    assert (
        "no epochs are left: 2 are done, and --epochs is 1" in out
        and "results.json already has the results of these epochs" in out
    )
    assert digests(tmp_path / "own") == before
    (tmp_path / "own" / "results.json").unlink()  # as if the run was killed before it wrote them
    assert script(*command, "--resume", "auto", "--epochs", 1)[0] == 0
    assert digests(tmp_path / "own") == before


def test_a_test_with_output_and_tag_is_named_by_the_classifier(script, shared_images, run):
    place = ("--output", run.parent, "--tag", run.name)
    command = ("main_semisup", shared_images, "--epochs", 1, "-b", 8, "-j", 0, *place)
    assert script(*command, "--train-percent", 100, "--weights", "freeze")[0] == 0
    own = run / "semisup-imagenet-freeze-100"
    status, out, err = script(
        "main_semisup",
        shared_images,
        "-e",
        "--resume",
        own / "checkpoint.pth.tar",
        "-b",
        8,
        "-j",
        0,
        *place,
    )
    assert status == 0, err
    assert (
        f"results in {own / 'semisup' / 'results.json'}" in out
        and not (run / "semisup-imagenet-finetune-10").exists()
    )


def test_a_checkpoint_of_another_script_is_named(script, shared_images, run, tmp_path):
    first = run / "checkpoint_0000.pth.tar"
    assert (
        script(*evaluation("main_lincls", shared_images, first), "--save-dir", tmp_path / "own")[0]
        == 0
    )
    probe = tmp_path / "own" / "checkpoint.pth.tar"
    for options in ((), ("-e",)):
        result = script(
            "main_semisup", shared_images, *options, "--resume", probe, "-b", 8, "-j", 0
        )
        refused(result, f"{probe}: is a checkpoint of main_lincls.py", "use that script")
    result = script("main_adco", shared_images, *SMALL, "--cluster", 32, "--resume", first)
    refused(result, f"{first}: is a checkpoint of main_synco.py", "use that script")


def test_a_classifier_stays_that_of_its_encoder(script, shared_images, run, tmp_path):
    other = shutil.copy(run / "checkpoint_0000.pth.tar", tmp_path / "other.pth.tar")
    command = evaluation("main_semisup", shared_images, run / "checkpoint_0000.pth.tar")
    assert script(*command, "--save-dir", tmp_path / "own")[0] == 0
    before = digests(tmp_path / "own")
    again = (
        *evaluation("main_semisup", shared_images, other),
        "--save-dir",
        tmp_path / "own",
        "--resume",
        "auto",
    )
    refused(script(*again), f"--pretrained is {other}, and was {run / 'checkpoint_0000.pth.tar'}")
    assert digests(tmp_path / "own") == before


# claiming


def claim(kind: type[Config], folder: Path, continues: bool, named: bool):
    config = replaced(kind(), save_dir=str(folder), script="lincls")
    return run_folder.claim(config, continues, named)


def test_programs_that_start_together_get_folders_of_their_own(tmp_path):
    evaluation = partial(claim, Evaluation, tmp_path / "run", False, True)
    unnamed = partial(claim, Pretraining, tmp_path / "runs" / "synco-20260101", False, False)
    named = partial(claim, Pretraining, tmp_path / "mine")
    with contextlib.ExitStack() as held:
        claims = [make() for make in (evaluation, unnamed) for _ in range(3)]
        configs = [held.enter_context(one) for one in claims]
        held.enter_context(named(False, True))
        for continues in (False, True):
            with (
                pytest.raises(InputError, match="another run is writing there"),
                named(continues, True),
            ):
                pass
    found = [Path(config.run.save_dir).relative_to(tmp_path) for config in configs]
    subfolders = ["run", "run/lincls", "run/lincls-2"]
    assert list(map(str, found)) == subfolders + [
        f"runs/synco-20260101{end}" for end in ("", "-2", "-3")
    ]


def test_a_run_that_writes_nothing_leaves_no_folder(script, shared_images, tmp_path):
    folder = tmp_path / "runs" / "deep" / "one"
    refused(
        script("main_synco", shared_images, *PRETRAIN, "-b", 4096, "--save-dir", folder),
        "do not fill one batch",
    )
    assert not (tmp_path / "runs").exists()
    with claim(Pretraining, folder, False, True):
        (folder / "log.jsonl").write_text("{}\n")
    assert (folder / "log.jsonl").exists()


def test_a_start_that_failed_before_its_first_step_blocks_no_folder(tmp_path):
    (tmp_path / "args.yaml").write_text("script: synco\n")
    (tmp_path / "log.jsonl").write_text("")
    run_folder.check_free(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="holds another run"):
        run_folder.check_free(tmp_path)


# tools


def tool_commands(run: Path, out: Path) -> dict[str, tuple]:
    """Return a command of each tool that writes, by the name of the file that it writes."""
    checkpoint = run / "checkpoint_0000.pth.tar"
    return {
        "report.html": ("tools/report.py", run, "--images", 20, "--out", out / "report.html"),
        "views.png": (
            "tools/show_views.py",
            "mocov2",
            "photos",
            "--images",
            1,
            "--out",
            out / "views.png",
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
    "name", ["report.html", "views.png", "encoder.pth", "table.md", "weights.pkl"]
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
    "moco/launch/output.py": "/dev/null",
    "moco/user.py": "this user's own folder for temporary files",
    "moco/engine/log.py": "a run's own folder, after claim",
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
    "moco/report/page.py": "creating",
    "tools/show_views.py": "creating",
    "tools/export.py": "a temporary folder, then creating",
    "moco/report/plots.py": "a picture in memory",
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


# resuming


def test_changed_options_are_refused_each_by_name(script, shared_images, run):
    before = digests(run)
    changed = ("--image-size", 48, "--moco-t", 0.2, "--aug-plus", "--lr", 0.3, "--epochs", 2)
    command = (
        "main_synco",
        shared_images,
        "-a",
        "resnet18",
        "-b",
        8,
        "-j",
        0,
        "--moco-k",
        32,
        "--save-dir",
        run,
    )
    result = script(*command, *changed, "--resume", "auto")
    names = ("image-size", "moco-t", "aug-plus", "lr")
    refused(
        result,
        *(f"--{name} is" for name in names),
        "0.3, and was 0.03",
        "--allow-change aug-plus,image-size,lr,moco-t",
    )
    refused(
        script(*command, *changed, "--resume", run / "checkpoint_0000.pth.tar"),
        *(f"--{name} is" for name in names),
    )
    refused(
        script(*command, "--image-size", 32, "-b", 4, "--resume", "auto"),
        "--batch-size is 4 in all, and was 8 in all",
    )
    refused(
        script(*command, "--image-size", 32, "--seed", 1, "--resume", "auto"),
        "--seed is 1, and was 0",
    )
    assert digests(run) == before


def test_an_option_is_changed_on_purpose(script, shared_images, run):
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        "--epochs",
        2,
        "--save-dir",
        run,
        "--resume",
        "auto",
    )
    refused(
        script(*command, "--lr", 0.5, "--wd", 0.2, "--allow-change", "lr"),
        "--wd is 0.2, and was 0.0001",
    )
    refused(script(*command, "--allow-change", "lrr"), "--allow-change lrr", "no such option")
    status, out, err = script(
        *command, "--lr", 0.5, "--wd", 0.2, "--momentum", 0.5, "--allow-change", "lr,--wd,momentum"
    )
    assert status == 0, err
    assert "--allow-change lr: 0.03 before, 0.5 from now on" in out
    (group,) = load(run / "checkpoint_0001.pth.tar")["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.2, 0.5)
    refused(
        script("main_synco", shared_images, *PRETRAIN, "--allow-change", "lr"),
        "no effect without --resume",
    )


def test_args_yaml_says_how_the_checkpoints_were_made(script, shared_images, run, monkeypatch):
    """A start that trains nothing, or ends before its first checkpoint, leaves it as it is."""
    from moco.engine.trainer import Trainer

    def interrupted(*_):
        raise KeyboardInterrupt

    before = digests(run)["args.yaml"]
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        "--save-dir",
        run,
        "--resume",
        "auto",
        "--lr",
        0.5,
        "--allow-change",
        "lr",
    )
    assert script(*command, "--epochs", 1)[0] == 0 and digests(run)["args.yaml"] == before
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", interrupted)
        assert script(*command, "--epochs", 2)[0] == 130 and digests(run)["args.yaml"] == before
    assert script(*command, "--epochs", 2)[0] == 0
    options = yaml.safe_load((run / "args.yaml").read_text())
    assert (options["lr"], options["epochs"]) == (0.5, 2)


def test_a_run_without_a_checkpoint_says_that_its_log_begins_anew(script, shared_images, run):
    (run / "checkpoint_0000.pth.tar").unlink()
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        "--epochs",
        1,
        "--save-dir",
        run,
        "--resume",
        "auto",
    )
    status, out, err = script(*command)
    assert status == 0, err
    assert f"--resume auto: no checkpoint in {run} yet; the run starts again, with a new log" in out


def test_names_of_changed_options_are_joined_by_commas(script, shared_images, run):
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        "--save-dir",
        run,
        "--resume",
        "auto",
        "--allow-change",
        "lr",
        "wd",
    )
    refused(script(*command), "unexpected argument 'wd'", "joined by commas: lr,wd")


def test_batch_norm_groups_may_differ_among_several_processes(monkeypatch):
    saved = {"args": {"bn_splits": 4, "lr": 0.1}, "progress": {"batch": 8}}
    given = {"bn_splits": 8, "lr": 0.1, "resume": "x/checkpoint.pth.tar"}
    config = replaced(main_synco.Config(), **given)
    with pytest.raises(InputError, match="--bn-splits is 8, and was 4"):
        resume.check_unchanged(config, saved, 8)
    monkeypatch.setattr(resume.distributed, "world_size", lambda: 2)
    resume.check_unchanged(config, saved, 8)


def test_more_epochs_change_a_cosine_and_nothing_else(script, shared_images, tmp_path):
    command = ("main_synco", shared_images, *PRETRAIN, "--resume", "auto", "--save-dir")
    for folder, schedule in ((tmp_path / "steps", ()), (tmp_path / "cosine", ("--cos",))):
        assert script(*command, folder, *schedule, "--epochs", 1)[0] == 0
        status, out, _ = script(*command, folder, *schedule, "--epochs", 1)
        assert status == 0 and "no epochs are left: 1 are done, and --epochs is 1" in out
    assert script(*command, tmp_path / "steps", "--epochs", 2)[0] == 0
    refused(
        script(*command, tmp_path / "cosine", "--cos", "--epochs", 2), "--epochs is 2, and was 1"
    )
    assert (
        script(*command, tmp_path / "cosine", "--cos", "--epochs", 2, "--allow-change", "epochs")[0]
        == 0
    )


def test_a_checkpoint_is_resumed_in_its_own_folder(
    script, shared_images, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = run / "checkpoint_0000.pth.tar"
    command = ("main_synco", shared_images, *PRETRAIN, "--epochs", 2)
    status, out, err = script(*command, "--resume", first)
    assert status == 0, err
    assert (
        f"run folder {run}" in out
        and (run / "checkpoint_0001.pth.tar").exists()
        and not (tmp_path / "runs").exists()
    )
    # the first one has been superseded: to go back to it is another run
    before = digests(run)
    refused(
        script(*command, "--resume", first),
        "checkpoint_0001.pth.tar in the same folder is further",
        "--save-dir",
    )
    assert digests(run) == before
    status, _, err = script(*command, "--resume", first, "--save-dir", tmp_path / "branch")
    assert status == 0, err
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "branch" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and steps[0] <= 6 and digests(run) == before


def test_a_run_folder_without_options_is_continued_by_its_checkpoints(script, shared_images, run):
    (run / "args.yaml").unlink()
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        "--epochs",
        2,
        "--save-dir",
        run,
        "--resume",
        "auto",
    )
    assert script(*command)[0] == 0
    assert yaml.safe_load((run / "args.yaml").read_text())["epochs"] == 2


# retention


def epochs(folder: Path) -> list[int]:
    return sorted(int(path.name[11:15]) for path in folder.glob("checkpoint_*.pth.tar"))


def test_the_newest_the_best_and_every_tenth_are_kept(script, shared_images, tmp_path, monkeypatch):
    from moco.engine.pretrain import PretrainingTask

    accuracies = iter([0.1, 0.2, 0.9, *[0.3] * 20])
    monkeypatch.setattr(PretrainingTask, "_knn", lambda self: next(accuracies))
    command = (
        "main_synco",
        shared_images,
        *PRETRAIN,
        "--knn-every",
        1,
        "--save-dir",
        tmp_path,
        "--resume",
        "auto",
    )
    assert script(*command, "--epochs", 5)[0] == 0
    assert epochs(tmp_path) == [2, 3, 4]
    assert script(*command, "--epochs", 13)[0] == 0  # the best is remembered over a resume
    assert epochs(tmp_path) == [2, 9, 11, 12]


def test_all_checkpoints_are_kept_if_asked_for(script, shared_images, tmp_path):
    command = ("main_synco", shared_images, *PRETRAIN, "--save-dir", tmp_path, "--resume", "auto")
    assert script(*command, "--epochs", 4, "--keep", "all")[0] == 0
    assert epochs(tmp_path) == [0, 1, 2, 3]
    assert script(*command, "--epochs", 7)[0] == 0  # a resume with the default spares what is there
    assert epochs(tmp_path) == [0, 1, 2, 3, 5, 6]
    assert script(*command, "--epochs", 9)[0] == 0  # and so does a second one
    assert epochs(tmp_path) == [0, 1, 2, 3, 7, 8]
    refused(script(*command, "--keep", "some"), "--keep", "neither a number nor the word all")


# what a checkpoint knows of itself


def test_an_evaluation_takes_the_image_size_from_the_checkpoint(
    script, shared_images, run, tmp_path
):
    checkpoint = run / "checkpoint_0000.pth.tar"
    command = (
        "main_knn",
        shared_images,
        "-b",
        8,
        "-j",
        0,
        "--k",
        1,
        "--pretrained",
        checkpoint,
        "--save-dir",
    )
    assert script(*command, tmp_path / "own")[0] == 0
    status, out, _ = script(*command, tmp_path / "other", "--image-size", 48)
    assert (
        status == 0 and "it was pre-trained at 32 pixels, and is used at 48 (--image-size)" in out
    )
    assert "normalized" not in out
    mean = ("--mean", 0.5, 0.45, 0.4)
    status, out, _ = script(*command, tmp_path / "mean", *mean)
    both = "with mean 0.485 0.456 0.406 in pre-training, and with mean 0.5 0.45 0.4 here (--mean)"
    assert status == 0 and out.count(f"images were normalized {both}\n") == 1
    sizes = [
        yaml.safe_load((tmp_path / name / "args.yaml").read_text())["image_size"]
        for name in ("own", "other")
    ]
    assert sizes == [32, 48]


def test_weights_alone_say_what_is_taken_for_granted(script, shared_images, run, tmp_path):
    """Use an exported .pth file, which cannot hold all options; tools/export.py prints them.

    Without them, a line says what is assumed.
    """
    exported = tmp_path / "encoder.pth"
    done = shell("tools/export.py", run / "checkpoint_0000.pth.tar", exported)
    succeeded(done)
    assert f"  --pretrained {exported} -a resnet18 --image-size 32\n" in done.stdout
    command = (
        "main_knn",
        shared_images,
        "-b",
        8,
        "-j",
        0,
        "--k",
        1,
        "--pretrained",
        exported,
        "--save-dir",
        tmp_path / "knn",
    )
    refused(
        script(*command), "does not name its network, and resnet50 was tried: give another -a ARCH"
    )
    assumed = f"{exported}: does not say its image size; 224 pixels are used (--image-size)"
    normal = (
        f"{exported}: does not say the {{}} of its images; ImageNet's {{}} used (--mean, --std)\n"
    )
    status, out, err = script(*command, "-a", "resnet18")
    assert status == 0 and assumed in out and normal.format("mean and std", "are") in out, err
    mean, std = ("--mean", 0.485, 0.456, 0.406), ("--std", 0.229, 0.224, 0.225)
    status, out, err = script(*command, "-a", "resnet18", *mean)
    assert status == 0 and normal.format("std", "is") in out, err
    status, out, err = script(*command, "-a", "resnet18", "--image-size", 32, *mean, *std)
    assert status == 0 and "does not say" not in out, err


@pytest.mark.parametrize("name", ["main_lincls", "main_semisup"])
def test_a_classifier_knows_its_network_size_and_classes(
    name, script, shared_images, run, tmp_path
):
    own = tmp_path / "own"
    assert (
        script(
            *evaluation(name, shared_images, run / "checkpoint_0000.pth.tar"), "--save-dir", own
        )[0]
        == 0
    )
    saved = own / "checkpoint.pth.tar"
    assert (
        load(saved)["classes"] == ["class0", "class1", "class2"] and load(saved)["image_size"] == 32
    )
    best = next(own.glob("model_best*.pth.tar"))
    (run / "checkpoint_0000.pth.tar").unlink()  # the classifier's own file has all of the network
    test = (name, shared_images, "-e", "--resume", best, "-b", 8, "-j", 0, "--save-dir")
    status, _, err = script(*test, tmp_path / "tested")
    assert status == 0, err
    results = [
        json.loads((place / "results.json").read_text()) for place in (own, tmp_path / "tested")
    ]
    assert (
        results[0]["metrics"] == results[1]["metrics"]
        and results[0]["method"] == results[1]["method"] == "moco"
    )
    status, out, _ = script(*test, tmp_path / "larger", "--image-size", 48)
    assert status == 0 and "was trained at 32 pixels, and is tested at 48 (--image-size)" in out
    refused(
        script(*test, tmp_path / "r", "-a", "resnet34"), "--arch resnet34", "trained with resnet18"
    )
    resume = (name, shared_images, "--resume", saved, "-b", 8, "-j", 0, "--epochs", 2)
    refused(script(*resume, "--image-size", 48), "--image-size 48", "trained with 32")


def test_a_classifier_of_other_classes_is_refused(script, shared_images, run, tmp_path):
    own = tmp_path / "own"
    assert (
        script(
            *evaluation("main_lincls", shared_images, run / "checkpoint_0000.pth.tar"),
            "--save-dir",
            own,
        )[0]
        == 0
    )
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", shared_images, other], check=True)
    for split in ("train", "val"):
        (other / split / "class1").rename(other / split / "stranger")
    test = (
        "main_lincls",
        other,
        "-e",
        "--resume",
        own / "model_best.pth.tar",
        "-b",
        8,
        "-j",
        0,
        "--save-dir",
        tmp_path / "t",
    )
    refused(script(*test), "its classes differ from the data's", "'class1'", "'class2'")
    for split in ("train", "val"):
        (other / split / "stranger").rename(tmp_path / f"{split}-gone")
    refused(script(*test), "has 3 classes, but the data has 2")
