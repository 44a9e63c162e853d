"""Test tools/prepare_imagenet.sh on archives of three classes."""

import io
import os
import signal
import sys
import tarfile

import numpy as np
import pytest
from conftest import own_lines
from PIL import Image
from run_helpers import bash

pytestmark = pytest.mark.slow

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
