"""Test the commands that a pre-training suggests at its end."""

import shutil

import pytest
from conftest import write_images
from shard_helpers import write_tars

import main_synco
from moco.engine import next_commands


@pytest.mark.parametrize("lost", ["folder", "subfolders", "tar file"])
def test_lost_images_leave_the_report(tmp_path, lost):
    data = write_images(tmp_path / "images")
    if lost == "tar file":
        data = write_tars(data, tmp_path / "tars")
    config = main_synco.parser().parse([str(data), "--save-dir", str(tmp_path / "run")])
    saved = tmp_path / "run" / "checkpoint_0000.pth.tar"
    before = next_commands.commands(config, saved)
    assert len(before) == 3 and all(str(data) in command for command in before[:2])
    if lost == "tar file":
        (data / "train-00001.tar").write_bytes(b"")
    else:
        shutil.rmtree(data)
    if lost == "subfolders":
        data.mkdir()
    assert next_commands.commands(config, saved) == before[2:]
    assert before[2].endswith(f"tools/report.py {tmp_path / 'run'}")
