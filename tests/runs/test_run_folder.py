"""A run folder belongs to one run: no other run, evaluation or tool changes a file in it."""

import contextlib
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from run_helpers import INPUT, PRETRAIN, VOC_SMALL, digests, evaluation, load, refused, typed
from voc_tree import write_voc

from moco.config import Config, Evaluation, Pretraining, replaced
from moco.engine import run_folder
from moco.errors import InputError

pytestmark = pytest.mark.slow


# evaluations
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
        *typed("--pretrained {} --save-dir {}", run / "checkpoint_0000.pth.tar", run),
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
    trained = typed("--train-percent 10 --weights finetune --lr-backbone 0.02")
    assert script(*command, *trained)[0] == 0
    own = run / "semisup-imagenet-finetune-10"
    status, out, err = script(
        "main_semisup",
        shared_images,
        *typed("-e --resume {} -b 8 -j 0", own / "checkpoint.pth.tar"),
        *place,
    )
    assert status == 0, err
    assert (
        f"results in {own / 'semisup' / 'results.json'}" in out
        and not (run / "semisup-imagenet-freeze-100").exists()
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
    result = script("main_adco", shared_images, *INPUT, "--cluster", 32, "--resume", first)
    refused(result, f"{first}: is a checkpoint of main_synco.py", "use that script")


def test_a_classifier_stays_that_of_its_encoder(script, shared_images, run, tmp_path):
    other = shutil.copy(run / "checkpoint_0000.pth.tar", tmp_path / "other.pth.tar")
    command = evaluation("main_semisup", shared_images, run / "checkpoint_0000.pth.tar")
    assert script(*command, "--save-dir", tmp_path / "own")[0] == 0
    before = digests(tmp_path / "own")
    again = (
        *evaluation("main_semisup", shared_images, other),
        *typed("--save-dir {} --resume auto", tmp_path / "own"),
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
