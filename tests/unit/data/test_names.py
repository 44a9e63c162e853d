"""Tests of `moco.data.names`: names in one text, and a file that must not change."""

import os
import pickle

import numpy as np
import pytest
from folder_helpers import error_message

from moco.data.names import GROUP, Names, UnchangedFile


def random_names(n, seed):
    """Return names of all lengths from 0 to 40, with every byte except null."""
    draw = np.random.default_rng(seed)
    return [bytes(draw.integers(1, 256, draw.integers(0, 41)).tolist()) for _ in range(n)]


@pytest.mark.parametrize("n", [0, 1, GROUP - 1, GROUP, GROUP + 1, 5 * GROUP, 1000])
def test_names_are_those_of_the_list_in_any_order(n):
    expected = random_names(n, seed=n)
    names = Names.of(expected)
    assert len(names) == n and list(names) == expected
    order = np.random.default_rng(0).permutation(n)
    assert [names[i] for i in order] == [expected[i] for i in order]
    assert [names[i - n] for i in range(n)] == expected
    for i in (n, -n - 1):
        with pytest.raises(IndexError):
            names[i]


def test_a_selection_is_that_of_an_array():
    expected = np.array(random_names(100, seed=1), object)
    names = Names.of(list(expected))
    mask = np.random.default_rng(2).random(100) < 0.5
    for chosen in (mask, np.array([3, 99, 3, -1, 0]), slice(5, 90, 6), np.array([], int)):
        part, wanted = names[chosen], expected[chosen]
        assert len(part) == len(wanted) and list(part) == list(wanted)
        assert list(part[::-2]) == list(wanted[::-2])
        assert part.digest() == Names.of(list(wanted)).digest()


def test_the_digest_depends_on_each_name_and_on_the_order():
    lists = ([b"a", b"b"], [b"b", b"a"], [b"ab"], [b"a", b"b", b""], [b"a"], [])
    assert len({Names.of(names).digest() for names in lists}) == len(lists)


def test_one_long_name_does_not_widen_the_others():
    names = Names.of([b"a.jpg"] * 10000 + [b"x" * 4000])
    assert len(names.text) + names.starts.nbytes < 10000 * 7 + 4001


def test_a_name_with_a_null_byte_is_refused():
    with pytest.raises(ValueError, match="null byte"):
        Names.of([b"a\0b"])


@pytest.fixture
def file(tmp_path):
    """A file with 100 bytes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    return path


def test_slices_of_a_file_are_those_of_its_bytes(file):
    content, read = file.read_bytes(), UnchangedFile(str(file))
    for part in (slice(None), slice(3, 17), slice(90, 200), slice(200, 300), slice(5, 5)):
        assert read[part] == pickle.loads(pickle.dumps(read))[part] == content[part]


@pytest.mark.parametrize("change", ["shorter", "longer", "other bytes"])
def test_a_file_that_changes_is_refused(file, change):
    read = UnchangedFile(str(file))
    copy = pickle.dumps(read)
    with open(file, "r+b") as out:
        if change == "shorter":
            out.truncate(10)
        else:
            out.seek(0, os.SEEK_END if change == "longer" else os.SEEK_SET)
            out.write(b"new")
    os.utime(file, ns=(0, 0))  # on some file systems, quick changes have the same time
    for one in (read, pickle.loads(copy)):
        assert f"{file}: has changed since it was listed" in error_message(lambda r: r[:5], one)


def test_a_file_that_is_replaced_or_deleted_is_still_read(file):
    content, read = file.read_bytes(), UnchangedFile(str(file))
    copy = pickle.dumps(read)
    file.unlink()
    assert read[:] == content
    file.write_bytes(b"new")
    assert read[:] == content
    assert "has changed" in error_message(lambda r: r[:], pickle.loads(copy))
