"""Generate some hundred bad inputs from a seed.

Each must end with one line and status 2, run nothing, and leave nothing behind. BAD_INPUTS_SEED=...
generates others. The generators are in tests/bad_inputs/.
"""

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_inputs.arguments import conflict, misspelled, nowhere, tool_arguments, wrong_value
from bad_inputs.base import Case, Place, accepted
from bad_inputs.checkpoints import bad_encoder, bad_features, bad_resume, thin
from bad_inputs.images import bad_image
from bad_inputs.texts import bad_list, bad_results, bad_yaml, bad_yaml_of_views
from conftest import in_process
from run_helpers import INPUT

SEED = int(os.environ.get("BAD_INPUTS_SEED", 0))
LONGEST = 1200  # characters of a line, without what the user typed


Generator = Callable[[random.Random, Place], Case]


GENERATORS: dict[Generator, int] = {
    wrong_value: 60,
    misspelled: 15,
    nowhere: 30,
    conflict: 35,
    tool_arguments: 20,
    bad_yaml: 45,
    bad_yaml_of_views: 6,
    bad_results: 10,
    bad_list: 20,
    bad_image: 20,
    bad_resume: 32,
    bad_encoder: 32,
    bad_features: 12,
}
CASES = [(generator, i) for generator, count in GENERATORS.items() for i in range(count)]


# The cases.
@pytest.fixture(scope="module")
def good(shared_images, tmp_path_factory) -> Path:
    """A run folder with a checkpoint after one epoch of two, and the same in a small file."""
    run = tmp_path_factory.mktemp("good")
    assert (
        in_process(
            "main_synco", shared_images, *INPUT, "--moco-k", 32, "--epochs", 1, "--save-dir", run
        )[0]
        == 0
    )
    torch.save(
        thin(torch.load(run / "checkpoint_0000.pth.tar", weights_only=True)), run / "thin.pth.tar"
    )
    return run


def contents(*folders: Path) -> dict[str, tuple[int, int]]:
    files = (file for folder in folders for file in folder.rglob("*"))
    return {
        str(file): (file.lstat().st_size, file.lstat().st_mtime_ns)
        for file in files
        if not file.is_dir()
    }


def test_there_are_enough():
    assert len(CASES) >= 300


@pytest.mark.parametrize(
    ("generator", "i"), CASES, ids=[f"{generator.__name__}-{i}" for generator, i in CASES]
)
def test_it_is_refused_in_one_line(generator, i, call, shared_images, good, tmp_path, monkeypatch):
    place = Place(shared_images, good, tmp_path / "own")
    place.own.mkdir()
    monkeypatch.chdir(place.own)
    case = generator(random.Random(f"{SEED} {generator.__name__} {i}"), place)
    told = f"BAD_INPUTS_SEED={SEED}: {case.program} {' '.join(map(repr, map(str, case.words)))}"[
        :2000
    ]
    before = contents(shared_images, good, place.own)
    if generator is not bad_image:
        monkeypatch.setattr("moco.engine.trainer.RunLog", accepted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, out, err = call(case.program, *case.words)
    assert status == 2, f"{told}\n{out}\n{err}"
    *others, line = err.splitlines() or [""]
    assert line.startswith(f"{case.program.removeprefix('tools.')}.py: error: "), f"{told}\n{err}"
    assert all("skipped, another image is used instead" in other for other in others), (
        f"{told}\n{err}"
    )
    typed = sum(2 * len(repr(str(word))) for word in case.words)
    assert len(line) <= LONGEST + typed and "Traceback" not in err, f"{told}\n{err}"
    assert all(word in line for word in case.said), f"{told}\n{line}"
    after = contents(shared_images, good, place.own)
    names = ("log.jsonl", "args.yaml", "status.json", ".lock", "subset.txt")
    log = {str(place.own / "run" / name) for name in names}
    left = [f for f in after.keys() - before.keys() - log if "events.out.tfevents" not in f]
    assert not left and all(after[file] == before[file] for file in before), f"{told}\n{left}"
    if generator is not bad_image:
        assert not (place.own / "run").exists(), told
    (place.own / "line").write_text(line)


def test_what_the_bad_ones_were_made_of_is_good(call, shared_images, good, tmp_path, monkeypatch):
    thin = good / "thin.pth.tar"
    run = ("--save-dir", tmp_path / "run")
    status, out, err = call(
        "main_synco", shared_images, *INPUT, "--moco-k", 32, "--epochs", 2, *run, "--resume", thin
    )
    assert status == 0 and "resumed from" in out, err
    assert call("main_knn", shared_images, *INPUT, "--k", 3, *run, "--pretrained", thin)[0] == 0
    assert call("convert-pretrain-to-detectron2", thin, tmp_path / "x.pkl")[0] == 0
