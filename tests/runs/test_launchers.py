"""Test each way to start several processes: spawn, torchrun, torch.distributed.launch and srun."""

import json
import socket

import pytest
from conftest import own_lines, shell
from run_helpers import TINY, load, log, succeeded, typed

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def by_spawn(options: tuple) -> str:
    return succeeded(shell(*options, "--multiprocessing-distributed", "--nproc-per-node", 2))


def by_torchrun(options: tuple) -> str:
    return succeeded(
        shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *options)
    )


def by_torch_distributed_launch(options: tuple) -> str:
    launch = (
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    )
    return succeeded(shell(*launch, *options))


def by_srun(options: tuple) -> str:
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
    }
    url = ("--dist-url", f"tcp://127.0.0.1:{free_port()}")
    tasks = [
        shell(
            *options,
            *url,
            env={**step, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)},
            wait=False,
        )
        for r in range(2)
    ]
    ended = [(*task.communicate(), task.returncode) for task in tasks]
    assert [status for *_, status in ended] == [0, 0], ended
    return ended[0][0]


@pytest.mark.parametrize("launcher", [by_spawn, by_torchrun, by_torch_distributed_launch, by_srun])
def test_two_processes_by_every_launcher(launcher, shared_images, tmp_path):
    options = (
        "main_synco.py",
        shared_images,
        *TINY,
        *typed("-j 0 --epochs 1 --warmup-epochs 0 --knn-every 1"),
    )
    out = launcher((*options, "--save-dir", tmp_path / "run"))
    assert "total batch 8 = 4 per process x 2 processes x 1 accumulation" in out
    state = load(tmp_path / "run" / "checkpoint_0000.pth.tar")
    assert state["progress"]["samples"] == 48
    assert state["state_dict"]["module.queue_ptr"].item() == 48
    assert 0 <= log(tmp_path / "run")[-1]["knn"] <= 1


def test_a_mistake_of_all_ranks_is_printed_once_by_torchrun(script, shared_images, tmp_path):
    command = (
        "main_synco.py",
        shared_images,
        *TINY,
        *typed("-j 0 --epochs 1 --save-dir {}", tmp_path / "run"),
    )
    assert script("main_synco", *command[1:])[0] == 0
    for options, said in (
        (("--lrr", 1), "unknown option '--lrr'"),
        (("--resume", "auto", "--lr", 0.5), "--lr is 0.5, and was"),
    ):
        done = shell(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command, *options
        )
        lines = [line for line in done.stderr.splitlines() if "main_synco.py: error:" in line]
        assert done.returncode == 1 and len(lines) == 1 and said in lines[0], done.stderr


def test_the_exchange_of_gradients_in_bf16_is_announced(shared_images, tmp_path):
    options = typed("-j 0 --epochs 1 --grad-compress bf16 --save-dir {}", tmp_path / "run")
    out = by_spawn(("main_synco.py", shared_images, *TINY, *options))
    assert "the processes exchange gradients in bf16" in out


def test_two_processes_evaluate_as_one(script, shared_images, tmp_path):
    """15 val images over 2 processes: the last batch is uneven, and no image counts twice."""
    common = (shared_images, *typed("-a resnet18 --image-size 32 -b 8 -j 0 --k 1 5 20"))
    assert script("main_knn", *common, "--save-dir", tmp_path / "one")[0] == 0
    two = ("--multiprocessing-distributed", "--nproc-per-node", 2, "--save-dir", tmp_path / "two")
    succeeded(shell("main_knn.py", *common, *two))
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        for name in ("one", "two")
    )
    assert one == two
    assert one["knn_1"] * 15 == pytest.approx(round(one["knn_1"] * 15))


def test_a_mistake_inside_spawned_processes_is_one_line(images, tmp_path):
    (images / "train" / "class0" / "1.jpg").write_bytes(b"")
    launch = ("--multiprocessing-distributed", "--nproc-per-node", 2)
    options = (*TINY, "-j", 2, "--epochs", 1, "--on-bad-image", "error")
    result = shell("main_synco.py", images, *options, *launch, "--save-dir", tmp_path / "run")
    assert result.returncode == 2
    assert own_lines(result.stderr)[-1].startswith("main_synco.py: error:"), result.stderr
    assert "class0/1.jpg" in result.stderr
    assert "Traceback" not in result.stderr
