"""Tests of `moco.data.file_lists`: lists of images for `--file-list`."""

import codecs
import os
import random
import re

import numpy as np
import pytest
import torch
from conftest import on_two_ranks
from data_helpers import read, write_jpeg
from folder_helpers import error_message, make_files, names_of

from moco.data import file_lists, registry
from moco.data.loader import CenterCrop, EvalBatchSampler
from moco.data.views import Views
from moco.errors import InputError


@pytest.fixture
def root(tmp_path):
    """A folder with three images."""
    return make_files(tmp_path / "data", "a.jpg", "sub/b c.PNG", "sub/d.jpg", "sub/notes.txt")


def written(folder, content):
    """Write a list. Return its path as text."""
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "list.txt").write_bytes(data)
    return str(folder / "list.txt")


def listed(file, root):
    """Check and read a list. Return the names of its images."""
    file_lists.check(file, root)
    images = file_lists.read(file, root)
    assert not images.labelled
    assert all(os.path.isfile(images.path(i)) for i in range(len(images)))
    return names_of(images)


def test_images_keep_the_order_of_the_list(root):
    file = written(root, "sub/d.jpg\na.jpg\nsub/b c.PNG\n")
    assert listed(file, root) == ["sub/d.jpg", "a.jpg", "sub/b c.PNG"]


def test_absolute_paths_lead_anywhere(root, tmp_path):
    file = written(tmp_path, f"{root}/sub/d.jpg\na.jpg")
    assert listed(file, root) == [f"{root}/sub/d.jpg", "a.jpg"]


@pytest.mark.parametrize(
    "content",
    [
        b"a.jpg\r\nsub/b c.PNG\r\n",
        codecs.BOM_UTF8 + b"a.jpg\nsub/b c.PNG",
        b"\n\na.jpg\n  \nsub/b c.PNG\n\n",
    ],
)
def test_line_ends_a_byte_order_mark_and_empty_lines_do_not_matter(root, content):
    assert listed(written(root, content), root) == ["a.jpg", "sub/b c.PNG"]


def test_names_need_not_be_utf_8(root):
    make_files(root, os.fsdecode(b"\xe9.jpg"))
    assert listed(written(root, b"\xe9.jpg\n"), root) == [os.fsdecode(b"\xe9.jpg")]


def test_a_path_that_is_listed_twice_counts_twice_and_a_line_says_so(root, capsys):
    file = written(root, "a.jpg\nsub/d.jpg\na.jpg\na.jpg\n")
    assert listed(file, root) == ["a.jpg", "sub/d.jpg", "a.jpg", "a.jpg"]
    assert "2 of 4 lines repeat a path; each line counts" in capsys.readouterr().out
    listed(written(root, "a.jpg\nsub/d.jpg\n"), root)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no image; expected one path a line"),
        ("\n \r\n", "names no image"),
        ("a.jpg\nsub/notes.txt\n", "line 2: 'sub/notes.txt' does not end like an image (.jpg, "),
        ("\na.jpg 0\n", "line 2: 'a.jpg 0' does not end like an image"),
        ("a.jpg \n", "line 1: 'a.jpg ' does not end like an image"),
        ("# images\na.jpg\n", "line 1: '# images' does not end like an image"),
        ("a.jpg\0sub/d.jpg\0", "cannot be read (not text in UTF-8); expected text with one path"),
        ("a.jpg\n\nnone.jpg\n", "line 3: {root}/none.jpg: no such file; relative paths start at"),
        ("/none.jpg\n", "line 1: /none.jpg: no such file"),
        (f"a.jpg\n{'x' * 4000}.jpg\n", "xxx ... xxx"),
        ("a.jpg\nsub.jpg\n", "line 2: {root}/sub.jpg: no such file"),  # a folder
    ],
)
def test_a_wrong_list_is_refused(root, content, message):
    (root / "sub.jpg").mkdir()
    file = written(root, content)
    said = error_message(file_lists.check, file, root)
    assert said.startswith(f"--file-list {file}") and message.format(root=root) in said
    assert ("relative paths" in said) == ("no such file" in said and content != "/none.jpg\n")
    if "no such file" not in said:  # what `check` alone looks up
        assert error_message(file_lists.read, file, root) == said


@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "null byte"])
def test_a_list_that_is_no_file_is_refused(root, what):
    path = str(root / "list") + "\0" * (what == "null byte")
    if what == "folder":
        os.mkdir(path)
    elif what == "pipe":
        os.mkfifo(path)  # opening it would wait for its writer
    reason = {"missing": "No such file", "null byte": "embedded null byte"}.get(
        what, "not a file; write"
    )
    for call in (file_lists.check, file_lists.read):
        message = str(error_message(call, path, root))
        assert message.startswith("--file-list ") and f"cannot be read ({reason}" in message


def test_a_long_list_is_checked_at_its_ends_and_between(root, monkeypatch):
    monkeypatch.setattr(file_lists, "CHECKED", 5)
    names = ["a.jpg"] * 101
    for missing in (0, 25, 50, 75, 100):
        file = written(root, "\n".join([*names[:missing], "none.jpg", *names[missing + 1 :]]))
        assert f"line {missing + 1}: " in error_message(file_lists.check, file, root)
    file_lists.check(written(root, "\n".join([*names[:3], "none.jpg", *names[4:]])), root)


def read_list_of_rank(rank, folder):
    """Read the list of this rank. Return the names, or the error in a list."""
    try:
        return len(registry.train_images("imagenet", folder, None, f"{folder}/list{rank}.txt"))
    except InputError as error:
        return [str(error)]


def test_different_lists_on_two_ranks_are_an_error_on_both(tmp_path):
    for name, lists in {
        "same": ["a.jpg\nb.jpg"] * 2,
        "order": ["a.jpg\nb.jpg", "b.jpg\na.jpg"],
    }.items():
        make_files(tmp_path, name)
        for rank, text in enumerate(lists):
            (tmp_path / name / f"list{rank}.txt").write_text(text)
    names = ("same", "order")
    of = on_two_ranks({name: (read_list_of_rank, str(tmp_path / name)) for name in names}, tmp_path)
    assert of("same") == [2, 2]
    for (message,) in of("order"):
        assert "rank 0 and rank 1 find different images (2 and 2 of them)" in message


def test_a_selection_of_a_list(root):
    images = file_lists.read(written(root, "a.jpg\nsub/d.jpg\n"), root)
    assert names_of(images.subset(np.array([1]))) == ["sub/d.jpg"]


@pytest.fixture(params=[1 << 20, 0], ids=["in memory", "in its file"])
def small_pieces(request, monkeypatch):
    """Read lists in pieces of a few lines, and keep them in memory or in their files."""
    monkeypatch.setattr(file_lists, "IN_MEMORY", request.param)
    monkeypatch.setattr(file_lists, "_CHUNK", 40)


@pytest.mark.parametrize("seed", range(12))
def test_a_list_of_any_form_has_the_lines_that_python_finds(root, small_pieces, seed):
    draw = random.Random(seed)
    breaks = draw.choice([["\n"], ["\r\n"], ["\r"], ["\n", "\r", "\r\n", "\n\n", "\n \t\r\n"]])
    lines = [f"{'x' * draw.randrange(100)}{i % 90}.jpg" for i in range(draw.randrange(1, 200))]
    text = "".join(line + draw.choice(breaks) for line in lines)
    text = draw.choice(["", "\ufeff"]) + text + draw.choice(["", "\n", "last.jpg"])
    file = written(root, text)
    images = file_lists.read(file, root)
    bare = text.removeprefix("\ufeff")
    expected = [line for line in re.split("\r\n|\r|\n", bare) if line.strip()]
    assert names_of(images) == expected
    assert [images.name(i) for i in reversed(range(len(images)))] == expected[::-1]
    other = file_lists.read(written(root / "sub", "\n".join(expected)), root)
    assert images.content() == other.content()


@pytest.mark.parametrize("where", [0, 3, 50, 199])
def test_a_mistake_anywhere_in_a_long_list_is_found_with_its_line(root, small_pieces, where):
    lines = ["a.jpg"] * 200
    for wrong, message in (("none.jpg", "no such file"), ("a.txt", "does not end like an image")):
        lines[where] = wrong
        said = error_message(file_lists.check, written(root, "\r\n".join(lines)), root)
        assert f"line {where + 1}: " in said and message in said
    lines[where] = "\0"
    said = error_message(file_lists.check, written(root, "\n".join(lines)), root)
    assert "not text in UTF-8" in said


def test_repeated_paths_of_a_long_list_are_counted(root, small_pieces, capsys):
    file_lists.check(written(root, "a.jpg\n\nsub/d.jpg\n" * 60), root)
    assert "118 of 120 lines repeat a path" in capsys.readouterr().out


def test_loader_processes_read_a_list_in_its_file(root, small_pieces):
    write_jpeg(root / "a.jpg")
    write_jpeg(root / "sub/d.jpg")
    images = file_lists.read(written(root, "a.jpg\nsub/d.jpg\n" * 50), root)
    batches = read(images, EvalBatchSampler(100, 10), CenterCrop(32), workers=2, batch=10)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(100))
    assert not any(batch.unreadable for batch in batches)


def test_a_list_that_is_written_again_during_the_run(root, monkeypatch):
    for limit in (1 << 20, 0):
        monkeypatch.setattr(file_lists, "IN_MEMORY", limit)
        file = written(root, "a.jpg\nsub/d.jpg\n" * 50)
        images = file_lists.read(file, root)
        written(root, "sub/d.jpg\n")
        if limit:
            assert images.name(0) == "a.jpg"
        else:
            changed = f"{file}: has changed since it was listed; start again"
            assert error_message(images.encoded, 0) == changed
            for skip in (False, True):  # another image cannot replace the list
                found = Views(images, CenterCrop(32), skip_unreadable=skip)[0, 0]
                assert str(found) == changed
