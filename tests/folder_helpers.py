"""Helpers of the tests of image folders and of `photos`."""

import os
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

from moco.errors import InputError

BOTH = ("train", "val")


def make_files(root, *files):
    """Make the named files, which are not images, and folders (names without an ending)."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_bytes(b"found by name, not read")
        else:
            path.mkdir()
    return root


def error_message(call, *arguments):
    """Return the message of the InputError that `call` raises, which is one line."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def names_of(folder):
    """Return the names of all images of an ImageFolder."""
    return [folder.name(i) for i in range(len(folder))]


def link(path, to):
    """Make `path` a link to `to`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def run_without_home(text, *words, **env):
    """Run a Python program in an environment without HOME and USER. Return the lines it prints.

    The program becomes another user, which only root can do: for others, the test is skipped.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    free = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")
    }
    with tempfile.TemporaryDirectory() as top:  # other users cannot enter pytest's own folders
        os.chmod(top, 0o755)
        command = [sys.executable, "-B", "-c", text, str(ROOT), *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=top, env=free | env)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
