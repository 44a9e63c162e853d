"""Which processes a command starts, and how many loader processes."""

import os
import re

import pytest
import torch
from conftest import shell
from launch_helpers import MEETING
from run_helpers import INPUT, SMALL, options, refused, typed

import main_adco
from moco.errors import InputError
from moco.launch import launch, processes
from moco.sections import Input, Launch


def launch_options(**given) -> Launch:
    """Return launch options, by default as if none was given."""
    return Launch(**given)


def test_plan_without_a_launcher_is_one_process(no_launcher):
    plan = processes.plan(launch_options())
    assert (plan.launcher, plan.world_size, plan.url) == ("single", 1, "")


def test_plan_of_torchrun(no_launcher, monkeypatch):
    for name, value in {
        **MEETING,
        "RANK": 5,
        "WORLD_SIZE": 8,
        "LOCAL_RANK": 1,
        "LOCAL_WORLD_SIZE": 4,
    }.items():
        monkeypatch.setenv(name, str(value))
    plan = processes.plan(launch_options())
    assert (
        plan.launcher,
        plan.nodes,
        plan.local_world_size,
        plan.first_rank,
        plan.world_size,
        plan.local_rank,
    ) == ("torchrun", 2, 4, 5, 8, 1)


def test_plan_of_srun(no_launcher, monkeypatch):
    values = {
        "SLURM_STEP_NUM_TASKS": 8,
        "SLURM_STEP_NUM_NODES": 2,
        "SLURM_PROCID": 6,
        "SLURM_LOCALID": 2,
    }
    for name, value in {**values, "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": 12}.items():
        monkeypatch.setenv(name, str(value))
    plan = processes.plan(launch_options())
    assert (
        plan.launcher,
        plan.nodes,
        plan.local_world_size,
        plan.first_rank,
        plan.world_size,
        plan.local_rank,
    ) == ("srun", 2, 4, 6, 8, 2)
    assert plan.url == "tcp://localhost:20012"
    monkeypatch.setenv("SLURM_STEP_ID", "1")  # another step of the same job
    assert processes.plan(launch_options()).url != plan.url


def test_plan_of_a_batch_script_without_srun_is_one_process(no_launcher, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert processes.plan(launch_options()).launcher == "single"


def test_plan_of_two_spawning_nodes(no_launcher):
    given = {
        "multiprocessing_distributed": True,
        "nproc_per_node": 3,
        "world_size": 2,
        "rank": 1,
        "dist_url": "tcp://10.0.0.1:9999",
    }
    plan = processes.plan(launch_options(**given))
    assert (plan.launcher, plan.nodes, plan.local_world_size, plan.first_rank, plan.world_size) == (
        "spawn",
        2,
        3,
        3,
        6,
    )


def test_env_url_reads_the_nodes_from_the_environment(no_launcher, monkeypatch):
    for name, value in {**MEETING, "RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    plan = processes.plan(
        launch_options(dist_url="env://", multiprocessing_distributed=True, nproc_per_node=3)
    )
    assert (
        plan.launcher,
        plan.nodes,
        plan.local_world_size,
        plan.first_rank,
        plan.world_size,
        plan.url,
    ) == (
        "spawn",
        2,
        3,
        3,
        6,
        "env://",
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--multiprocessing-distributed", "--dist-url", "tcp://localhost"), "tcp://HOST:PORT"),
        (("--multiprocessing-distributed", "--world-size", 2, "--rank", 0), "--dist-url"),
        (("--multiprocessing-distributed", "--world-size", 2, "--rank", 2), "--rank 2"),
        (("--gpu", 99), "--gpu 99"),
    ],
)
def test_impossible_launch_is_an_error(script, images, options, word):
    refused(script("main_synco", images, *SMALL, *options), word)


@pytest.fixture
def gpus(no_launcher, monkeypatch):
    """Return a function that sets the number of GPUs of this machine."""

    def has(n: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    return has


def adco(*words: object) -> processes.Plan:
    """Return the plan of main_adco.py with these options."""
    return processes.plan(main_adco.parser().parse(["d", *map(str, words)]).launch)


def test_adco_uses_every_gpu_by_default(gpus):
    for count, words, expected in (
        (8, (), ("spawn", 8)),
        (8, ("--nproc-per-node", 3), ("spawn", 3)),
        (8, ("--gpu", 2), ("single", 1)),
        (8, ("--no-multiprocessing-distributed",), ("single", 1)),
        (8, ("--multiprocessing_distributed", 0), ("single", 1)),
        (8, ("--multiprocessing-distributed",), ("spawn", 8)),
        (1, (), ("single", 1)),
        (0, (), ("single", 1)),
        (0, ("--nproc-per-node", 2), ("spawn", 2)),
    ):
        gpus(count)
        plan = adco(*words)
        assert (plan.launcher, plan.local_world_size, plan.world_size) == (
            *expected,
            expected[1],
        ), (
            count,
            words,
        )
    gpus(8)
    plan = adco("--world-size", 2, "--rank", 1, "--dist-url", "tcp://10.0.0.1:9999")
    assert (plan.launcher, plan.local_world_size, plan.first_rank, plan.world_size) == (
        "spawn",
        8,
        8,
        16,
    )


def test_other_scripts_use_one_gpu_by_default(gpus):
    gpus(8)
    assert processes.plan(options("d")).launcher == "single"


def test_launcher_overrides_the_default_of_adco(gpus, monkeypatch):
    gpus(8)
    for name, value in {
        "SLURM_STEP_NUM_TASKS": 8,
        "SLURM_PROCID": 3,
        "SLURM_LOCALID": 3,
        "SLURM_STEP_NODELIST": "localhost",
    }.items():
        monkeypatch.setenv(name, str(value))
    assert adco().launcher == "srun"
    torchrun = {"RANK": 3, "WORLD_SIZE": 8, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 8}
    for name, value in (torchrun | {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(name, str(value))
    assert adco().launcher == "torchrun"
    with pytest.raises(InputError, match="torchrun has started a process per GPU already"):
        adco("--multiprocessing-distributed")


def test_adco_prints_the_number_of_processes(images, tmp_path):
    small = (images, *INPUT, *typed("--epochs 1 --cluster 16 --moco-dim 8 --no-ad-init"))
    done = shell("main_adco.py", *small, "--nproc-per-node", 2, "--save-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (
        "2 processes: one for each visible GPU" in done.stdout
        and "4 per process x 2 processes" in done.stdout
    )


def test_cores_are_limited_by_affinity_and_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(processes, "CGROUP", tmp_path)
    assert processes.cores() == 12
    for text, expected in (
        ("max 100000", 12),
        ("250000 100000", 3),
        ("10000 100000", 1),
        ("9900000 100000", 12),
        ("?", 12),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert processes.cores() == expected, text
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, expected in ((-1, 12), (400_000, 4)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(str(quota))
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
        assert processes.cores() == expected, quota


@pytest.mark.parametrize(
    ("cores", "local", "per_node", "per_process"),
    [(2, 1, 2, 2), (1, 4, 1, 1), (96, 8, 64, 8), (12, 4, 12, 3), (96, 1, 8, 8)],
)
def test_default_number_of_loader_processes_follows_the_cores(
    monkeypatch, cores, local, per_node, per_process
):
    monkeypatch.setattr(processes, "cores", lambda: cores)
    plan = processes.Plan("spawn", 1, local, 0, local, 0, "")
    assert processes.default_workers(plan, Input(batch_is_per_process=False)) == per_node
    assert processes.default_workers(plan, Input(batch_is_per_process=True)) == per_process


@pytest.mark.parametrize(
    ("launcher", "local", "environment", "expected"),
    [
        ("single", 1, {}, 10),
        ("single", 1, {"OMP_NUM_THREADS": "3"}, 16),  # PyTorch has read the variable
        ("spawn", 4, {}, 2),
        ("spawn", 4, {"OMP_NUM_THREADS": "1"}, 16),
        ("spawn", 20, {}, 1),
        ("torchrun", 4, {"OMP_NUM_THREADS": "1"}, 2),  # torchrun's own value
        ("torchrun", 4, {"OMP_NUM_THREADS": "3"}, 16),
        ("srun", 4, {}, 2),
        ("srun", 4, {"SLURM_CPUS_PER_TASK": "10"}, 10),
    ],
)
def test_threads_share_the_cores_unless_the_user_chose(
    monkeypatch, launcher, local, environment, expected
):
    """The process may use 10 cores, and PyTorch would start 16 threads."""
    monkeypatch.setattr(processes, "cores", lambda: 10)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plan = processes.Plan(launcher, 1, local, 0, local, 0, "")
    assert processes.threads(plan, 16) == expected


def test_a_single_process_has_at_most_the_threads_that_pytorch_chose(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 10)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes.threads(processes.Plan("single", 1, 1, 0, 1, 0, ""), 6) == 6


@pytest.mark.parametrize(
    ("counts", "each"),
    [({}, 16), ({"batch_is_per_process": True}, 64), ({"batch_is_of_all_nodes": True}, 5)],
)
def test_the_batch_of_a_process_is_that_of_a_node_or_of_all_nodes(counts, each):
    """The run has 3 nodes with 4 processes each."""
    assert processes.batch_per_process(Input(batch_size=64, **counts), 4, 3) == each


@pytest.mark.parametrize(
    ("batch", "counts", "said"),
    [
        (3, {}, "--batch-size 3 is smaller than the 4 processes of this node; raise it"),
        (11, {"batch_is_of_all_nodes": True}, "is smaller than the 12 processes of all nodes"),
    ],
)
def test_a_batch_of_less_than_an_image_per_process_is_an_error(batch, counts, said):
    with pytest.raises(InputError, match=re.escape(said)):
        processes.batch_per_process(Input(batch_size=batch, **counts), 4, 3)


def test_number_of_loader_processes_is_in_help_and_options(script, images, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 5)
    assert "here 5" in " ".join(script("main_synco", "--help")[1].split())
    found = []
    monkeypatch.setattr(launch, "launch", lambda worker, config: found.append(config.input.workers))
    command = ("main_synco", images, *INPUT[:-2], "--save-dir", tmp_path / "run")
    assert script(*command)[0] == script(*command, "-j", 0)[0] == 0
    assert found == [5, 0]
