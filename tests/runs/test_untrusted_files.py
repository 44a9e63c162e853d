"""Test files with code in them: it never runs."""

import importlib.util
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from bad_inputs.checkpoints import CODE, Code
from conftest import own_lines, wants_detectron2

from moco.errors import InputError
from moco.pickles import read_pickle


# Pickles and YAML.
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_arrays_is_read(protocol, tmp_path):
    value = {
        "model": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "n": np.float64(2),
        "of": OrderedDict(x=(1, [None, True])),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    found = read_pickle(tmp_path / "x.pkl")
    assert (
        np.array_equal(found["model"]["w"], value["model"]["w"])
        and found["n"] == 2
        and found["of"] == {"x": (1, [None, True])}
    )


@pytest.mark.parametrize("how", CODE)
def test_a_pickle_of_code_is_not_run(how, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": [Code(tmp_path / "ran", how)]}))
    with pytest.raises(InputError, match="only plain values and numpy's arrays are read"):
        read_pickle(tmp_path / "x.pkl")
    objects = pickle.dumps(np.array([Code(tmp_path / "ran", how)], dtype=object))
    (tmp_path / "x.pkl").write_bytes(objects)
    with pytest.raises(InputError):
        read_pickle(tmp_path / "x.pkl")
    assert not (tmp_path / "ran").exists()


def test_batches_of_cifar_that_are_code_are_not_run(script, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Code(tmp_path / "ran", "system")))
    status, _, err = script(
        "main_knn", tmp_path, "--dataset", "cifar10", "--save-dir", tmp_path / "run"
    )
    assert (
        status == 2
        and len(own_lines(err)) == 1
        and "no usable cifar10" in err
        and not (tmp_path / "ran").exists()
    )


@pytest.mark.slow
@wants_detectron2
def test_weights_and_configs_of_detectors_that_are_code_are_not_run(tmp_path, monkeypatch):
    c4 = importlib.import_module("c4")
    config, weights = tmp_path / "c.yaml", tmp_path / "w.pkl"
    weights.write_bytes(pickle.dumps({"model": Code(tmp_path / "ran", "system")}))
    with pytest.raises(InputError, match=r"w\.pkl: holds"):
        c4.config(
            c4.CONFIGS / "pascal_voc_R_50_C4_24k_moco.yaml", ["MODEL.WEIGHTS", str(weights)], 0
        )
    config.write_text(f"MODEL: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(InputError, match=r"c\.yaml"):
        c4.config(config, [], 0)
    assert not (tmp_path / "ran").exists()
