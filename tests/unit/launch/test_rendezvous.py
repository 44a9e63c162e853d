"""Errors about the address where the processes of a run connect are one line."""

import socket

import pytest
from launch_helpers import MEETING
from run_helpers import SMALL, refused

from moco.launch import address, rendezvous


@pytest.fixture
def taken_port():
    """Yield a port on which another program listens without answering."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_port_in_use_is_an_error(script, images, taken_port):
    url = f"tcp://127.0.0.1:{taken_port}"
    result = script(
        "main_synco", images, *SMALL, "--multiprocessing-distributed", "--dist-url", url
    )
    refused(result, str(taken_port), "in use")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"MASTER_ADDR": None, "MASTER_PORT": None},
            ("but not MASTER_ADDR and MASTER_PORT", "unset RANK and WORLD_SIZE"),
        ),
        ({"MASTER_PORT": None}, ("but not MASTER_PORT,", "torchrun")),
        ({"MASTER_PORT": "abc"}, ("MASTER_PORT localhost:abc", "a port from 1 to 65535")),
        ({"MASTER_PORT": 70000}, ("localhost:70000", "a port from 1 to 65535")),
        ({"MASTER_ADDR": "nosuchhost.invalid"}, ("cannot resolve nosuchhost.invalid",)),
        ({"MASTER_ADDR": "a..b"}, ("cannot resolve a..b",)),
        ({"MASTER_ADDR": "192.0.2.1"}, ("cannot be reached as 192.0.2.1", "this machine's name")),
        ({"RANK": 2, "WORLD_SIZE": 2}, ("RANK = 2 and WORLD_SIZE = 2",)),
        ({"RANK": "zero"}, ("RANK=zero", "not a number")),
        ({"LOCAL_RANK": 3}, ("LOCAL_RANK = 3 and LOCAL_WORLD_SIZE = 1",)),
        ({"LOCAL_WORLD_SIZE": 2}, ("LOCAL_WORLD_SIZE - 1 = 1 and WORLD_SIZE = 1",)),
        ({"LOCAL_WORLD_SIZE": 0}, ("LOCAL_WORLD_SIZE - 1 = -1",)),
    ],
)
def test_wrong_environment_of_a_launcher_is_one_line(
    no_launcher, monkeypatch, script, images, environment, words
):
    monkeypatch.setattr(address, "OWN", 0.5)
    for name, value in {**MEETING, **environment}.items():
        if value is not None:
            monkeypatch.setenv(name, str(value))
    refused(script("main_synco", images, *SMALL), *words)


def test_port_in_use_of_a_launcher_is_one_line(
    no_launcher, monkeypatch, script, images, taken_port
):
    for name, value in {**MEETING, "MASTER_PORT": taken_port}.items():
        monkeypatch.setenv(name, str(value))
    refused(script("main_synco", images, *SMALL), f"port {taken_port} is in use")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ("lacks SLURM_PROCID", "srun")),
        (
            {"SLURM_PROCID": 2, "SLURM_LOCALID": 0},
            ("SLURM_PROCID = 2 and SLURM_STEP_NUM_TASKS = 2",),
        ),
        (
            {"SLURM_PROCID": 1, "SLURM_LOCALID": 1, "SLURM_STEP_NODELIST": "nosuchhost.invalid"},
            ("cannot resolve nosuchhost",),
        ),
    ],
)
def test_wrong_environment_of_srun_is_one_line(
    no_launcher, monkeypatch, script, images, environment, words
):
    for name, value in {"SLURM_STEP_NUM_TASKS": 2, **environment}.items():
        monkeypatch.setenv(name, str(value))
    refused(script("main_synco", images, *SMALL), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--dist-url", "env://"),
            (
                "--dist-url env:// is given, but not MASTER_ADDR and MASTER_PORT",
                "leave --dist-url out",
            ),
        ),
        (("--dist-url", "tcp://nosuchhost.invalid:99"), ("cannot resolve nosuchhost.invalid:99",)),
        (("--dist-url", "tcp://192.0.2.1:23462"), ("cannot be reached as 192.0.2.1",)),
        (("--dist-url", "tcp://[::1:99"), ("expected tcp://HOST:PORT",)),
        (
            ("--dist-url", "tcp://nosuchhost.invalid:99", "--world-size", 2, "--rank", 1),
            ("cannot resolve nosuchhost",),
        ),
    ],
)
def test_wrong_dist_url_is_one_line(no_launcher, monkeypatch, script, images, options, words):
    monkeypatch.setattr(address, "OWN", 0.5)
    refused(script("main_synco", images, *SMALL, "--multiprocessing-distributed", *options), *words)


@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_waits_alone_prints_it_and_ends(
    no_launcher, monkeypatch, script, images, rank
):
    monkeypatch.setattr(rendezvous, "SILENCE", 0.2)
    monkeypatch.setattr(rendezvous, "MEETING", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    status, out, err = script("main_synco", images, *SMALL, "--save-dir", images / "run")
    waits = (
        f"rank 1 waits for rank 0 at 127.0.0.1:{port}"
        if rank
        else f"1 of 2 processes have connected to 127.0.0.1:{port}"
    )
    assert out.count(waits) == 1, out + err
    refused((status, out, err), waits, "for 1 seconds")


def test_another_server_at_the_address_is_one_line(
    no_launcher, monkeypatch, script, images, taken_port
):
    monkeypatch.setattr(rendezvous, "SILENCE", 0.5)
    for name, value in {
        **MEETING,
        "RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": taken_port,
    }.items():
        monkeypatch.setenv(name, str(value))
    refused(
        script("main_synco", images, *SMALL), f"127.0.0.1:{taken_port}", "not rank 0 of this run"
    )
