"""The tools for people: pictures of views, ImageNet's archives as folders, jobs under SLURM."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, own_lines
from PIL import Image

from moco import rng
from moco.augment import color, recipes
from moco.cli import tool
from moco.data import loader
from moco.errors import InputError
from moco.report.views import view_columns, views_figure
from moco.rng import Progress
from tools import show_views

pytestmark = pytest.mark.slow


def test_ctrl_c_is_one_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert tool.attempt("report.py", work) == 130
    assert capsys.readouterr() == ("", "report.py: interrupted\n")


# tools/show_views.py


def test_a_picture_of_views_and_one_line_for_mistakes(tmp_path, shared_images, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["show_views.py", *map(str, words)])
        status = show_views.main()
        return status, capsys.readouterr()

    out = tmp_path / "a folder" / "views.png"
    status, said = call("multicrop", shared_images, "--image-size", 32, "--images", 2, "--out", out)
    assert (status, said.out) == (0, f"{out}\n")
    width, height = Image.open(out).size
    assert width > 3 * height  # the image and two draws of six views; two rows
    (tmp_path / "bad.yaml").write_text("recipe: [")
    options = tmp_path / "run" / "args.yaml"
    options.parent.mkdir()
    options.write_text("recipe: mocov2")
    for words, what in (
        (["mocov9"], "the nearest is 'mocov2'"),
        (["mocov2", tmp_path / "none"], "no such folder"),
        (["mocov2", tmp_path / "a folder", "--out", tmp_path / "views.jpg"], "a PNG"),
        (["mocov2", "--images", "0"], "0 is below 1"),
        (["--cfg", tmp_path / "bad.yaml"], "not YAML"),
        (["--cfg", ROOT / "configs/lincls_moco.yaml"], "names no recipe"),
        (["mocov2", ROOT / "configs"], "holds no image"),
        (["mocov2", shared_images, "--crop-min", "2"], "--crop-min: 2"),
        (
            ["mocov1", "--blur-sigma", "1", "2"],
            "--blur-sigma 1 2 has no effect: the views of mocov1",
        ),
        ([options], f"a file, not the name of a recipe; give it with --cfg {options}"),
        ([options.parent, shared_images], f"not the name of a recipe; give --cfg {options}"),
    ):
        status, said = call(*words)
        assert status == 2 and what in said.err and len(own_lines(said.err)) == 1, (words, said.err)


def test_views_are_training_s(shared_images):
    images = show_views.find(str(shared_images))
    recipe = recipes.recipe("byol", 32)
    picked, seed = [0, 5, 40], 3
    columns = view_columns(images, picked, recipe, seed, draws=2)
    assert [column.title for column in columns] == [
        "",
        *(f"view {view}, draw {draw}" for view in (1, 2) for draw in (1, 2)),
    ]
    cut = loader.RandomCrops(recipe, seed)
    crops = torch.stack([cut(images.read(i), (1, i))[1] for i in picked])
    seen = color.augment(
        crops, recipe[1], Progress(seed, 1, step=1).generator(rng.COLOR, "cpu", 0, 1)
    )
    again = color.normalize(torch.stack(list(columns[4].images)))
    inside = (seen == again.clamp(seen.min(), seen.max())) | ((seen - again).abs() < 1e-4)
    assert inside.float().mean() > 0.999
    assert "solarize, p 0.2" in columns[3].heading and "solarize" not in columns[1].heading


def test_a_recipe_file_says_which_views(tmp_path):
    def of(*words):
        args = show_views.parse(list(map(str, words)))
        return recipes.from_settings(show_views.views_of(args)), args

    configs = ROOT / "configs"
    assert of("--cfg", configs / "mocov1_200.yaml")[0] == recipes.recipe("mocov1")
    assert of("--cfg", configs / "synco_200.yaml")[0] == recipes.recipe("mocov2")
    assert of("--cfg", configs / "adco_multicrop_200.yaml")[0] == recipes.recipe("multicrop")
    file = tmp_path / "args.yaml"
    file.write_text(
        "recipe: fnc\nsupport_size: 2\nimage-size: 64\nrandaugment: [1, 3]\n"
        "blur-sigma: [0.2, 0.5]\nlr: .3\nseed: 4\n"
    )
    views, args = of("--cfg", file, "--image-size", 32)
    assert views == recipes.recipe(
        "fnc", 32, views=4, randaugment=(1, 3), blur_sigma=(0.2, 0.5)
    ) and (args.seed, args.data) == (
        4,
        "photos",
    )
    views, args = of("sogclr", "DIR", "--cfg", file)
    assert args.data == "DIR" and views[0].blur_p == 1
    file.write_text("recipe: fnc\nimage-size: many\n")
    with pytest.raises(InputError, match=r"args\.yaml: argument --image-size"):
        of("--cfg", file)


def test_any_folder_of_images_can_be_shown(tmp_path):
    folder = tmp_path / "of mine" / "deeper"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((20, 30 + i, 3), 90, np.uint8)).save(folder / f"{i}.png")
    images = show_views.find(str(tmp_path / "of mine"))
    assert [images.name(i) for i in range(len(images))] == [
        "deeper/0.png",
        "deeper/1.png",
        "deeper/2.png",
    ]
    assert show_views.find(str(folder / "1.png")).read(0).shape == (3, 20, 31)
    assert (
        show_views.evenly_spaced(3, 5) == [0, 1, 2]
        and show_views.evenly_spaced(10, 3) == [0, 4, 9]
        and show_views.evenly_spaced(4, 1) == [0]
    )
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir" / "1.png").write_bytes(b"a thumbnail")
    (folder / "0.png").rename(folder / os.fsdecode(b"\xe9.png"))
    images = show_views.find(str(tmp_path / "of mine"))
    assert [os.fsencode(images.name(i)) for i in range(3)] == [
        b"deeper/1.png",
        b"deeper/2.png",
        b"deeper/\xe9.png",
    ]
    views_figure(images, [0, 2], recipes.recipe("mocov2", 16)).savefig(tmp_path / "views.png")
    assert show_views.find(str(folder / os.fsdecode(b"\xe9.png"))).read(0).shape == (3, 20, 30)
    (folder / "1.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"1\.png"):
        views_figure(images, [0, 1], recipes.recipe("mocov2", 16))


# tools/prepare_imagenet.sh, on archives of 3 classes

WNIDS = ("n00000001", "n00000002", "n00000003")
COUNTS = ["--counts", 3, 12, 6]


def picture(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 9, 9)).save(file, "jpeg")
    return file.getvalue()


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def class_tar(wnid, count=4):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i in range(count):
            add(archive, f"{wnid}_{i}.JPEG", picture(i))
    return file.getvalue()


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "the tars"
    folder.mkdir()
    write_train(folder, {wnid: class_tar(wnid) for wnid in WNIDS})
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in range(1, 7):
            add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", picture(i))
    (folder / "labels").write_text("".join(f"{WNIDS[i % 3]}\n" for i in range(6)))
    return folder


def write_train(folder, classes):
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        for wnid, data in classes.items():
            add(archive, f"{wnid}.tar", data)


def bash(*words, env=None, **more):
    words = ["bash", *map(str, words)]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=60,
        **more,
    )


def prepare(tars, out, *options, env=None):
    done = bash("tools/prepare_imagenet.sh", tars, out, *COUNTS, *options, env=env)
    assert done.returncode in (0, 2), done.stderr
    return done


def tree(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


WHOLE = sorted(
    [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(4)]
    + [f"val/{WNIDS[i % 3]}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(6)]
)


def test_the_archives_become_folders(tmp_path, tars):
    out = tmp_path / "with spaces" / "imagenet"
    done = prepare(tars, out)  # without labels: train/ alone, and what to fetch
    assert (
        done.returncode == 2
        and "ILSVRC2012_devkit_t12.tar.gz" in done.stderr
        and len(own_lines(done.stderr)) == 1
    )
    assert [name for name in tree(out) if not name.startswith(".prepare")] == WHOLE[:12]
    done = prepare(tars, out, "--val-labels", tars / "labels")
    assert done.returncode == 0, done.stderr
    assert tree(out) == WHOLE and not (out / ".prepare").exists()
    (tars / "ILSVRC2012_img_train.tar").unlink()
    assert prepare(tars, out).returncode == 0  # all is there


def test_labels_in_other_forms(tmp_path, tars):
    named = [(f"ILSVRC2012_val_{i + 1:08d}", WNIDS[i % 3]) for i in range(6)]
    forms = (
        "mkdir -p n00000001\n"
        + "".join(f"mv {name}.JPEG {wnid}/\n" for name, wnid in reversed(named)),
        "ImageId,PredictionString\n"
        + "".join(f"{name},{wnid} 1 2 3 4\r\n" for name, wnid in named),
    )
    for i, form in enumerate(forms):
        (tars / "labels").write_text(form)
        assert prepare(tars, tmp_path / str(i), "--val-labels", tars / "labels").returncode == 0
        assert tree(tmp_path / str(i)) == WHOLE
    for text, what in (
        ("n00000001\n" * 6, "1 classes have 2"),
        ("n00000001\n", "1 images; expected 6"),
        ("rm -rf /\n", "line 1: rm"),
        (forms[0] + forms[1], "each once"),
    ):
        (tars / "labels").write_text(text)
        done = prepare(tars, tmp_path / "none", "--val-labels", tars / "labels")
        assert (
            done.returncode == 2 and "labels: " in done.stderr and len(own_lines(done.stderr)) == 1
        ), done.stderr
        assert what in done.stderr or "0 classes have 2" in done.stderr, done.stderr
    assert not (tmp_path / "none" / "train").exists()  # labels are looked at first


def test_the_devkit_s_labels(tmp_path, tars):
    from hashlib import md5

    from scipy.io import savemat

    form = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
    ]
    # The devkit's numbers are not in the order of the names. The last row is the parent of a class.
    rows = [
        (1, WNIDS[2], "c", "g", 0),
        (2, WNIDS[1], "b", "g", 0),
        (3, WNIDS[0], "a", "g", 0),
        (4, "n00000009", "p", "g", 3),
    ]
    synsets = np.array(rows, dtype=form).reshape(-1, 1)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    devkit = tars / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{3 - i % 3}\n" for i in range(6)).encode()
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    env = {"PYTHON": sys.executable, "DEVKIT_MD5": md5(devkit.read_bytes()).hexdigest()}
    done = prepare(tars, tmp_path / "out", env=env)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == WHOLE


def test_stopped_anywhere_it_goes_on(tmp_path, tars):
    """Kill the script at each of its calls of tar; no incomplete class is ever visible."""
    stub = tmp_path / "bin" / "tar"
    stub.parent.mkdir()
    stub.write_text(
        '#!/bin/bash\necho >>"$CALLS"\n'
        '[ "$(wc -l <"$CALLS")" != "$STOP" ] || { kill -9 "$(cat "$LOCK")"; exit 1; }\n'
        'exec "$TAR" "$@"\n'
    )
    stub.chmod(0o755)
    tar = bash("-c", "command -v tar").stdout.strip()
    out, calls = tmp_path / "out", tmp_path / "calls"
    env = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "TAR": tar,
        "LOCK": str(out / ".prepare/lock/pid"),
    }
    words = ["tools/prepare_imagenet.sh", tars, out, *COUNTS, "--val-labels", tars / "labels"]
    for stop in (3, 5, 4, 6, 3):
        calls.write_text("")
        done = bash(*words, env={**env, "STOP": str(stop)})
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert {len(list(folder.iterdir())) for folder in out.glob("train/*")} <= {4}
        assert not (out / "val").exists() or len(tree(out / "val")) == 6
    assert bash(*words).returncode == 0
    assert tree(out) == WHOLE


def test_short_classes_are_named_and_kept_as_they_are(tmp_path, tars):
    out = tmp_path / "out"
    options = ["--val-labels", tars / "labels"]
    # an archive cut off, then one whose class lacks an image, then one cut inside a class
    whole = (tars / "ILSVRC2012_img_train.tar").read_bytes()
    (tars / "ILSVRC2012_img_train.tar").write_bytes(whole[:9000])
    done = prepare(tars, out, *options)
    assert (
        done.returncode == 2
        and "ILSVRC2012_img_train.tar: " in done.stderr
        and len(own_lines(done.stderr)) == 1
    )
    cut = class_tar(WNIDS[1])
    image = 512 + -(-len(picture(0)) // 512) * 512
    for length in (700, image, image + 64, 2 * image, 4 * image, 4 * image + 512):
        write_train(
            tars,
            {WNIDS[0]: class_tar(WNIDS[0]), WNIDS[1]: cut[:length], WNIDS[2]: class_tar(WNIDS[2])},
        )
        done = prepare(tars, out, *options)
        assert done.returncode == 2 and "n00000002.tar" in done.stderr, (length, done.stderr)
        assert [folder.name for folder in (out / "train").iterdir()] == [WNIDS[0]], length
    write_train(tars, {wnid: class_tar(wnid, 3 if wnid == WNIDS[1] else 4) for wnid in WNIDS})
    done = prepare(tars, out, *options)
    assert (
        done.returncode == 2
        and "train/ holds 11 images" in done.stderr
        and "n00000002 with 3" in done.stderr
    )
    assert len(tree(out / "val")) == 6
    # an image lost since, or empty as after a power failure, or never there
    (tars / "ILSVRC2012_img_train.tar").write_bytes(whole)
    (out / "train" / WNIDS[0] / "n00000001_1.JPEG").write_bytes(b"")
    done = prepare(tars, out, *options)
    assert done.returncode == 2 and "train/n00000001 has 3 of 4" in done.stderr
    for wnid in WNIDS[:2]:
        (out / "train" / wnid).rename(tmp_path / f"old {wnid}")
    assert prepare(tars, out, *options).returncode == 0
    assert tree(out) == WHOLE
    (out / "val" / WNIDS[2] / "ILSVRC2012_val_00000003.JPEG").unlink()
    done = prepare(tars, out, *options)
    assert done.returncode == 2 and "n00000003 has 1 of 2" in done.stderr


def test_a_val_archive_without_an_image(tmp_path, tars):
    with tarfile.open(tars / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in range(1, 6):
            add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", picture(i))
    done = prepare(tars, tmp_path / "out", "--val-labels", tars / "labels")
    assert (
        done.returncode == 2
        and "val/n00000003 has 1 of 2" in done.stderr
        and not (tmp_path / "out" / "val").exists()
    )


def test_disk_and_sums_are_checked_first(tmp_path, tars):
    df = tmp_path / "bin" / "df"
    df.parent.mkdir()
    df.write_text(
        "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted on\n"
        "echo 'a disk  9000 8990 10  99% /mnt/a b'\n"
    )
    df.chmod(0o755)
    done = prepare(tars, tmp_path / "out", env={"PATH": f"{df.parent}:{os.environ['PATH']}"})
    assert (
        done.returncode == 2
        and " 10 KiB are free" in done.stderr
        and not (tmp_path / "out" / "train").exists()
    )
    done = prepare(tars, tmp_path / "out", "--md5")
    assert done.returncode == 2 and "not 1d675b47d978889d74fa0da5fadfb00e" in done.stderr
    lock = tmp_path / "out" / ".prepare" / "lock"
    lock.mkdir()
    (lock / "pid").write_text(str(os.getpid()))
    done = prepare(tars, tmp_path / "out")
    assert done.returncode == 2 and f"process {os.getpid()}" in done.stderr and lock.exists()


# tools/slurm.sh, with a stand-in for srun. It starts a process per task, and the first failure
# kills the others.

SRUN = """
import os, signal, subprocess, sys, time
options = [word for word in sys.argv[1:sys.argv.index("bash")]]
tasks = int(next(word for word in options if word.startswith("--ntasks=")).split("=")[1])
open(os.environ["SEEN"], "a").write(" ".join(options) + chr(10))
words = sys.argv[sys.argv.index("bash"):]
running = [
    subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(i)}, start_new_session=True)
    for i in range(tasks)
]
def send(number, frame):
    for task in running:
        if task.poll() is None:
            os.killpg(task.pid, number)
signal.signal(signal.SIGUSR1, send)
while any(task.poll() is None for task in running):
    if any(task.poll() for task in running):
        send(signal.SIGKILL, None)
    time.sleep(0.02)
codes = [task.wait() for task in running]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun.py").write_text(SRUN)
    stubs = {
        "srun": f'exec {sys.executable} "{folder}/srun.py" "$@"',
        "scontrol": 'echo "$@" >>"$REQUEUED"',
        "train": 'printf "<%s>" "$@" >"$0.$SLURM_PROCID"; eval "$TRAIN"',
    }
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "train"),
        "REQUEUED": str(tmp_path / "requeued"),
    }
    env |= {
        "SEEN": str(tmp_path / "seen"),
        "SLURM_JOB_ID": "77",
        "SLURM_GPUS_PER_NODE": "a100:2",
        "SLURM_JOB_NUM_NODES": "2",
    }
    env |= {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_GPU": "8"}
    return env


RUN = ["tools/slurm.sh", "main_synco.py", "--save-dir"]


def test_a_task_per_gpu_gets_every_word(tmp_path, slurm):
    run = tmp_path / "a run"
    done = bash(*RUN, run, "--tag", "two words", "a * DIR", env=slurm)
    assert done.returncode == 0, done.stderr
    for task in range(4):
        words = (tmp_path / "bin" / f"train.{task}").read_text()
        assert (
            words
            == f"<main_synco.py><--save-dir><{run}><--tag><two words><a * DIR><--resume><auto>"
        )
    seen = (tmp_path / "seen").read_text().split()
    assert {
        "--nodes=2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=1",
    } == set(seen)
    assert not (tmp_path / "requeued").exists() and not list(run.iterdir())


def test_status_75_requeues_and_another_is_the_job_s(tmp_path, slurm):
    # the tasks end one after the other, which srun must not take for a failure
    done = bash(*RUN, tmp_path / "run", env={**slurm, "TRAIN": "sleep .$SLURM_PROCID; exit 75"})
    assert done.returncode == 75 and (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "requeued").unlink()
    began = time.monotonic()
    done = bash(
        *RUN,
        tmp_path / "run",
        env={**slurm, "TRAIN": '[ "$SLURM_PROCID" = 1 ] && exit 3; exec sleep 30'},
    )
    assert done.returncode == 137 and time.monotonic() - began < 20  # the others were killed
    done = bash(
        *RUN, tmp_path / "run", env={**slurm, "TRAIN": '[ "$SLURM_PROCID" = 1 ] && exit 2; exit 75'}
    )
    assert done.returncode in (2, 137)
    done = bash(*RUN, tmp_path / "run", env={**slurm, "TRAIN": "exit 4"})
    assert done.returncode in (4, 137)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_scripts(tmp_path, slurm, number):
    """Send USR1 to the tasks: the job is requeued. Send TERM to the shell, too: SLURM decides."""
    # as the scripts do: the one at rank 0 takes longer, for it saves
    train = (
        'trap "sleep .$((3 - SLURM_PROCID)); exit 75" USR1 TERM; touch "$0.up.$SLURM_PROCID"; '
        "while :; do sleep .05; done"
    )
    folder = tmp_path / "bin"
    # sent to the task's own shell alone, which has to pass it on
    (folder / "srun.py").write_text(
        SRUN.replace("SIGUSR1, send", f"{number.name}, send").replace("os.killpg", "os.kill")
    )
    words = ["bash", *map(str, RUN), str(tmp_path / "run")]
    job = subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **slurm, "TRAIN": train},
        start_new_session=True,
        text=True,
    )
    end = time.monotonic() + 30
    while len(list(folder.glob("train.up.*"))) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    if number == signal.SIGTERM:
        os.killpg(job.pid, number)
    else:
        os.kill(
            int(
                subprocess.run(
                    ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
                ).stdout.split()[0]
            ),
            number,
        )
    assert job.wait(30) == 75
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)


def test_what_a_job_cannot_do_is_one_line(tmp_path, slurm):
    for words, what in (
        (["main_synco.py", "DIR"], "--save-dir RUN"),
        ([], "no script"),
        (["main_nothing.py", "--save-dir", "x"], "no such script"),
        (["main_synco.py", "--save-dir=x", "--resume", "y"], "leave it out"),
        (["main_synco.py", "--output", "x", "--multiprocessing-distributed"], "leave it out"),
    ):
        done = bash("tools/slurm.sh", *words, env=slurm)
        assert done.returncode == 2 and what in done.stderr and len(own_lines(done.stderr)) == 1, (
            done.stderr
        )
    done = bash(*RUN, tmp_path / "run", env={**slurm, "SLURM_JOB_ID": ""})
    assert done.returncode == 2 and "submit it" in done.stderr and not (tmp_path / "run").exists()


def test_help_needs_nothing():
    assert "--val-labels FILE" in bash("tools/prepare_imagenet.sh", "--help").stdout
    assert "--cfg FILE.yaml" in show_views.parser().format_help()
    assert all(bash("-n", script).returncode == 0 for script in sorted(ROOT.glob("tools/*.sh")))
