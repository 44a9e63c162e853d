"""Run the scripts on tar, parquet and arrow files: equal results to those on a folder."""

import json
import signal

import pytest
from conftest import shell, write_images
from fault_helpers import SYNCO, TWO, logged, until
from run_helpers import facts, load, refused, same, succeeded, typed
from shard_helpers import write_arrow, write_parquet, write_tar, write_tars

FORMS = {"tar": write_tars, "parquet": write_parquet, "arrow": write_arrow}
TEN = typed("-a resnet18 --image-size 32 -b 4 -j 1 --epochs 1 -p 1 --moco-k 24 --mlp --n-hard 8")
TEN += typed("--n1 2 --n4 2 --warmup-epochs 0 --seed 3")
KNN = typed("--knn-every 1 --knn-k 5")
FROM_FILES = ("--cache-images", "off")  # loader processes read the files in every epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of 40 training images, which are ten steps of four."""
    return write_images(tmp_path_factory.mktemp("shards") / "folder", train=20)


@pytest.fixture(scope="module")
def forms(folder):
    """Return the same images in each form."""
    return {name: write(folder, folder.parent / name) for name, write in FORMS.items()}


@pytest.fixture(scope="module")
def trained(folder, forms, tmp_path_factory):
    """Return the run folder of ten steps on the folder and on each form."""
    from conftest import in_process

    runs = {}
    for name, data in {"folder": folder, **forms}.items():
        runs[name] = tmp_path_factory.mktemp("runs") / name
        status, _, err = in_process(
            "main_synco", data, *TEN, *KNN, *FROM_FILES, "--save-dir", runs[name]
        )
        assert status == 0, err
    return runs


@pytest.mark.parametrize("name", FORMS)
def test_ten_steps_have_equal_losses_and_end_with_equal_weights(trained, name):
    lines = [facts(trained[one]) for one in (name, "folder")]
    losses = [line["loss"] for line in lines[0] if "loss" in line]
    assert len(losses) >= 10 and any("knn" in line for line in lines[0])
    assert lines[0] == lines[1]
    ours, theirs = (load(trained[one] / "checkpoint_0000.pth.tar") for one in (name, "folder"))
    assert same(ours["state_dict"], theirs["state_dict"])


def test_images_that_stay_in_memory_give_the_same_losses(script, trained, forms, tmp_path):
    words = (*TEN, *KNN, "--cache-images", "on", "--save-dir", tmp_path / "run")
    status, out, err = script("main_synco", forms["tar"], *words)
    assert status == 0 and "images stay in memory" in out, err
    assert facts(tmp_path / "run") == facts(trained["folder"])


EVALUATIONS = {
    "main_knn": typed("--k 1 5 -b 8 -j 1"),
    "main_lincls": typed("--lr 0.1 --epochs 2 -b 8 -j 1 --val-from-train 0.25"),
    "main_semisup": typed("--train-percent 10 --epochs 1 -b 8 -j 0"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_evaluations_equal_those_on_the_folder(
    script, folder, forms, trained, tmp_path, evaluation, name
):
    found = []
    for one, data in (("folder", folder), (name, forms[name])):
        words = ("--pretrained", trained["folder"] / "checkpoint_0000.pth.tar")
        out = tmp_path / one
        status, _, err = script(
            evaluation, data, *words, *EVALUATIONS[evaluation], "--save-dir", out
        )
        assert status == 0, err
        found.append(json.loads((out / "results.json").read_text())["metrics"])
    assert found[0] == found[1]


def test_class_lists_and_label_lists_work_on_tar_files(script, forms, trained, tmp_path):
    (tmp_path / "classes.txt").write_text("class1\n")
    words = (*TEN, "--class-list", tmp_path / "classes.txt")
    status, out, err = script("main_synco", forms["tar"], *words, "--save-dir", tmp_path / "run")
    assert status == 0 and "20 images of 1 class" in out, err
    (tmp_path / "labels.txt").write_text("class0/3\nclass1/4\nclass0/11.jpg\nclass1/12.jpg\n")
    words = ("--pretrained", trained["folder"] / "checkpoint_0000.pth.tar", "--subset-file")
    words += (tmp_path / "labels.txt", *typed("--epochs 1 -b 4 -j 0"))
    status, out, err = script("main_semisup", forms["tar"], *words, "--save-dir", tmp_path / "semi")
    assert status == 0 and "4 of 40 training images are labelled" in out, err
    assert len((tmp_path / "semi" / "subset.txt").read_text().splitlines()) == 4


def test_a_bad_member_is_skipped_or_ends_the_run(script, folder, tmp_path):
    good = [path.read_bytes() for path in sorted(folder.rglob("train/*/*.jpg"))] * 3
    members = [(f"{i}.jpg", data) for i, data in enumerate(good)]
    write_tar(tmp_path / "data" / "0.tar", ("bad.jpg", b"no image"), *members)
    words = (tmp_path / "data", *TEN, *FROM_FILES, "--save-dir")
    status, _, err = script("main_synco", *words, tmp_path / "skip")
    assert status == 0 and err.count(f"{tmp_path / 'data'}/0.tar/bad.jpg") == 1, err
    result = script("main_synco", *words, tmp_path / "error", "--on-bad-image", "error")
    refused(result, f"{tmp_path / 'data'}/0.tar/bad.jpg: unreadable image")


@pytest.mark.parametrize("name", ["tar", "parquet"])
def test_views_and_report_show_the_images(call, trained, forms, tmp_path, name):
    picture = tmp_path / "views.png"
    words = typed("mocov2 {} --image-size 32 --images 2 --out {}", forms[name], picture)
    status, _, err = call("tools.show_views", *words)
    assert status == 0 and picture.stat().st_size > 1000, err
    page = tmp_path / "report.html"
    status, _, err = call("tools.report", trained[name], *typed("--images 20 --out {}", page))
    assert status == 0 and page.read_text().count("<img") >= 3, err


def test_a_tar_file_that_has_changed_since_the_start_is_named(script, folder, tmp_path):
    data = write_tars(folder, tmp_path / "data")
    (data / "train-00001.tar").write_bytes((data / "train-00001.tar").read_bytes()[:5000])
    result = script("main_synco", data, *TEN, "--save-dir", tmp_path / "run")
    refused(result, "train-00001.tar: is truncated or damaged", lines=1)


# processes


def state(run):
    checkpoint = load(run / "checkpoint_0001.pth.tar")
    return {key: checkpoint[key] for key in ("epoch", "state_dict", "optimizer", "progress")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tar", "parquet"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_resumed_runs_end_with_the_same_bits(shared_images, tmp_path, name, number):
    data = FORMS[name](shared_images, tmp_path / "data")
    succeeded(shell(*SYNCO, shared_images, "--save-dir", tmp_path / "whole"))
    run = tmp_path / "run"
    command = (*SYNCO, *FROM_FILES, data, "--save-dir", run, "--save-every-steps", 3)
    command += ("--resume", "auto")
    process = shell(*command, wait=False)
    until(lambda: any(step >= 8 for step in logged(run)), process, seconds=600)
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode != 0
    tar_index = data / ".tar-index-train.npz"
    tar_index.unlink(missing_ok=True)  # a new list gives the same images
    assert "resum" in succeeded(shell(*command))
    assert same(state(run), state(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tar", "parquet"])
def test_two_spawned_processes_equal_those_on_the_folder(shared_images, tmp_path, name):
    data = FORMS[name](shared_images, tmp_path / "data")
    for one, run in ((shared_images, "folder"), (data, name)):
        out = succeeded(shell(*SYNCO, *FROM_FILES, *TWO, one, "--save-dir", tmp_path / run))
    assert "48 images of 3 classes" in out
    assert same(state(tmp_path / name), state(tmp_path / "folder"))


@pytest.mark.slow
def test_loader_processes_may_be_spawned(forms, folder, tmp_path):
    """Other start methods than fork pickle the images."""
    code = (
        "import torch.multiprocessing as mp, sys\n"
        "if __name__ == '__main__':\n"
        "    mp.set_start_method('spawn')\n"
        "    sys.argv = sys.argv[1:]\n"
        "    import main_synco\n"
        "    from moco.cli import entry\n"
        "    entry.main(main_synco.parser(), main_synco.complete, main_synco.worker)\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    for name in ("tar", "parquet"):
        run = tmp_path / name
        succeeded(
            shell(program, "main_synco.py", forms[name], *TEN, *FROM_FILES, "--save-dir", run)
        )
    assert facts(tmp_path / "tar") == facts(tmp_path / "parquet")
