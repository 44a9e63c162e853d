"""The benchmark of scaling: its counted bytes, its predictions, and docs/scaling.md."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling
import scaling_check
import scaling_counter
import scaling_page
import scaling_predict
import scaling_shards
from scaling_counts import TABLE, Collective, wire

RESULTS = json.loads(scaling.RESULTS.read_text())


@pytest.mark.slow
def test_the_formulas_count_what_two_processes_communicate():
    """Check the payload of all collectives of steps, log lines and epochs."""
    found = scaling_check.compare(["mocov2", "adco", "sogclr", "fnc"], 2, loopback=False)
    for rows in (one["rows"] for one in found):
        assert {row["when"] for row in rows} == {"step", "log line", "epoch"}
        assert {row["what"] for row in rows} == {"gradient", "other"}
        for row in rows:
            assert row["counted"] == row["measured"] > 0, row


def test_the_process_group_counts_every_collective(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(scaling_counter.BACKEND, store=store, rank=0, world_size=1)
    record = scaling_counter.Record()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(scaling_counter, "RECORD", record)
        try:
            dist.all_reduce(torch.zeros(3))
            dist.all_reduce(torch.zeros(5, dtype=torch.double))
            dist.broadcast(torch.zeros(2), 0)
            with pytest.raises(RuntimeError):  # none is missed
                dist.gather(torch.zeros(2), [torch.zeros(2)])
        finally:
            dist.destroy_process_group()
    assert {key[2]: value[:2] for key, value in record.found.items()} == {
        "all_reduce": [2, 52],
        "broadcast": [1, 8],
    }


def test_the_committed_measurements_are_within_the_limit():
    """Check that they have all methods on 2, 4 and 8 processes."""
    checks = RESULTS["checks"]
    assert {(one["method"], one["ranks"]) for one in checks} == {
        (method, ranks) for method in TABLE for ranks in (2, 4, 8)
    }
    worst = scaling_check.worst(checks)
    assert worst["payload"] <= scaling_check.LIMIT
    assert worst["sent"] <= scaling_check.LIMIT
    for of in RESULTS["factors"].values():
        for one in of.values():
            assert one["measured"] == pytest.approx(one["factor"], rel=scaling_check.LIMIT)
    assert all(map(scaling_shards.agrees, RESULTS["shards"]))


def test_a_wrong_formula_is_noticed():
    row = {"when": "step", "what": "other", "op": "all_reduce", "counted": 100.0, "measured": 102.0}
    missing = {**row, "counted": 0.0}
    assert scaling_check.worst([{"rows": [row]}])["payload"] > scaling_check.LIMIT
    assert scaling_check.worst([{"rows": [missing]}])["payload"] == 1


def test_the_page_has_the_committed_results():
    text = scaling.PAGE.read_text()
    assert text.count("<!-- table: ") == len(scaling_page.SECTIONS)
    assert scaling_page.filled(text, RESULTS) == text


@pytest.mark.parametrize("method", ["mocov2", "fnc"])
def test_the_committed_predictions_are_those_of_the_code(method):
    cluster, one = scaling_predict.Cluster(**RESULTS["cluster"]), scaling_predict.measured()
    committed = [p for p in RESULTS["predictions"] if p["method"] == method and p["ranks"] == 64]
    for p in committed:
        found = scaling_predict.predict(method, p["batch"], 64, cluster, one)
        assert found["sent"] == pytest.approx(p["sent"])
        assert found["lost"] == pytest.approx(p["lost"])
        assert found["memory"] == pytest.approx(p["memory"])


def test_time_of_a_collective():
    """10 us to start, 2 x 7 hops of 1 us, and 1.75 x 1 GB at .8 x 450 GB/s; 16 GPUs in 2 nodes."""
    cluster = scaling_predict.Cluster()
    one = Collective("gradient", "all_reduce", 10**9)
    inside = 24e-6 + 1.75 / 360
    assert scaling_predict.seconds(one, 8, cluster) == pytest.approx(inside)
    across = 34e-6 + 1.875 / 320  # 8 adapters of 50 GB/s are slower than NVLink
    assert scaling_predict.seconds(one, 16, cluster) == pytest.approx(across)
    exchange = Collective("image exchange", "all_to_all", 10**9)
    away = 10e-6 + 20e-6 + 0.5 / 40  # half of the images leave the node
    assert scaling_predict.seconds(exchange, 16, cluster) == pytest.approx(away)
    assert scaling_predict.seconds(one, 1, cluster) == wire("all_reduce", 10**9, 1) == 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_state_has_the_results_of_replicated_state(ranks, tmp_path):
    found = scaling_shards.measure(ranks, tmp_path, entries=192, images=5001)
    assert scaling_shards.agrees(found), found
    assert found["u"]["visited"] > 256
    found["u"]["equal_losses"] = False
    assert not scaling_shards.agrees(found)
