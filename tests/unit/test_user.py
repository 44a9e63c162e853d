"""Tests of `moco.user`: users without a name or home, and terminals."""

import io
import os
import sys
import tempfile

import pytest
from folder_helpers import run_without_home

from moco import user

WITHOUT_A_NAME = """
import getpass, os, sys
sys.path.insert(0, sys.argv[1])
from moco import user
from moco.data import sources, photos
photos.PHOTOS = ["chelsea"]
photos._photograph("chelsea")
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
user.prepare()
print(getpass.getuser(), os.path.expanduser("~"))
print(sources.find("photos", ("train", "val")))
"""


def test_a_user_without_a_name_or_home_gets_both():
    """PyTorch's compiler, for example, asks for them."""
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o1777)
        home = f"{top}/hard-negatives-54321"
        lines = run_without_home(WITHOUT_A_NAME, TMPDIR=top)
        assert lines == [f"54321 {home}", f"{home}/.cache/hard-negatives/photos-v2"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", b"pi\\udce8ces \xe6\x97\xa5\n"), ("ascii", b"pi\\udce8ces \\u65e5\n")],
)
def test_any_file_name_can_be_printed(monkeypatch, encoding, text):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    user.prepare()
    for stream in (sys.stdout, sys.stderr):
        print("pi\udce8ces \u65e5", file=stream, flush=True)
        assert stream.buffer.getvalue() == text
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # closed
    user.prepare()
