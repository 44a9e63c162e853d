"""Test the TensorBoard events: tags, settings, hyperparameters, and the first views."""

import io
import json
import urllib.request
from pathlib import Path

import pytest
import torch
from fault_helpers import until_true
from PIL import Image
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from moco.augment import color, recipes
from moco.config import Pretraining, replaced
from moco.engine.board import GAP, Board, tag, tiles


def settings(folder: Path, **changed) -> Pretraining:
    return replaced(Pretraining(), save_dir=str(folder), **changed)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("images", "tensors"), 0))
    return found.Reload()


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("loss", "loss acc1 acc5 cosine"),
        ("optim", "lr momentum grad_encoder grad_predictor"),
        (
            "features",
            "hardness hardness_mixup alignment uniformity feature_std u fn_precision loss2",
        ),
        ("eval", "knn knn_gain val_acc1 val_acc1_lr30 val_best_lr probe_acc1"),
        ("time", "data_wait epoch"),
    ],
)
def test_metrics_are_grouped(group, names):
    assert [tag(name) for name in names.split()] == [f"{group}/{name}" for name in names.split()]


def test_two_tags_say_what_they_count():
    assert (tag("images_per_s"), tag("time")) == ("time/images_per_second", "time/seconds")


def session_groups(folder: Path, runs: int) -> dict[str, tuple[dict, dict]]:
    """Return the rows of TensorBoard's page of hyperparameters: options and metrics of each run.

    Waits until TensorBoard has read so many runs.
    """
    board = program.TensorBoard()
    words = ["--logdir", str(folder), "--port", "0", "--load_fast", "false"]
    board.configure(["tensorboard", *words, "--reload_interval", "1"])
    url = board.launch()

    def ask(page: str, body: object = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{url}data/plugin/{page}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    until_true(lambda: len(ask("scalars/tags")) == runs)
    columns = [{"metric": one["name"]} for one in ask("hparams/experiment", {})["metricInfos"]]
    words = {"allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS"], "colParams": columns}
    rows = ask("hparams/session_groups", {"startIndex": 0, "sliceSize": 10, **words})
    return {
        row["name"]: (
            row["hparams"],
            {value["name"]["tag"]: value["value"] for value in row["metricValues"]},
        )
        for row in rows.get("sessionGroups", ())
    }


def write(folder: Path, step: int, finished: bool, **changed) -> None:
    """Write the events of one start of a run."""
    board = Board(settings(folder, **changed), max(0, step - 1))
    board.scalars({"loss/loss": 5.0 - step, "eval/knn": step / 10}, step)
    board.close(finished)


def test_a_resumed_run_is_one_row_of_hyperparameters_with_its_last_metrics(tmp_path):
    write(tmp_path / "a", 1, finished=False, lr=0.5)
    write(tmp_path / "a", 2, finished=True, lr=0.5, resume="checkpoint")
    write(tmp_path / "a", 3, finished=True, lr=0.5, resume="checkpoint")  # with more --epochs
    write(tmp_path / "b", 1, finished=True, lr=0.25)
    write(tmp_path / "c", 1, finished=False)
    rows = session_groups(tmp_path, runs=3)
    assert rows.keys() == {"a", "b"}  # c is not finished
    assert [rows[name][0]["lr"] for name in "ab"] == [0.5, 0.25]
    assert rows["a"][1] == {"eval/knn": pytest.approx(0.3), "loss/loss": 2.0}
    assert rows["b"][1] == {"eval/knn": pytest.approx(0.1), "loss/loss": 4.0}


def test_hyperparameters_are_those_that_change_the_result(tmp_path):
    write(tmp_path / "a", 1, finished=False)
    with pytest.raises(KeyError):
        events(tmp_path / "a").PluginTagToContent("hparams")
    write(tmp_path / "b", 1, finished=True, mean=(0.5, 0.25, 0.5))
    content = events(tmp_path / "b").PluginTagToContent("hparams")["_hparams_/session_start_info"]
    options = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["lr"].number_value == 0.03
    assert options["mean"].string_value == "0.5 0.25 0.5"
    # neither what does not change the result nor what is not set
    assert {"batch_size", "wd", "arch"} <= options.keys()
    assert not {"save_dir", "workers", "track", "cfg", "std"} & options.keys()


def test_the_settings_are_a_table(tmp_path):
    Board(settings(tmp_path, data="a|b"), 0).close(False)
    (text,) = events(tmp_path).Tensors("config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:2] == ["| option | value |", "|---|---|"]
    assert {"| data | a\\|b |", "| lr | 0.03 |", "| schedule | 120 160 |"} <= set(lines)


def test_the_first_views_are_drawn_as_the_network_sees_them(tmp_path):
    config = settings(tmp_path, recipe="byol", image_size=32)
    recipe = recipes.from_settings(config.views)
    images = [torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(v)) for v in (0, 1)]
    views = [
        color.normalize(x.expand(-1, -1, 32, 32), view.mean, view.std)
        for x, view in zip(images, recipe, strict=True)
    ]
    before = torch.get_rng_state()
    board = Board(config, 0)
    board.views(views, recipe)
    board.views([view + 1 for view in views], recipe)  # of another batch
    board.close(False)
    assert torch.equal(torch.get_rng_state(), before)
    (drawn,) = events(tmp_path).Images("views/first_batch")
    picture = Image.open(io.BytesIO(drawn.encoded_image_string))
    side = 32 + GAP
    assert picture.size == (drawn.width, drawn.height) == (8 * side, 2 * side)
    for v, row in enumerate(images):
        for i in range(8):
            pixel = torch.tensor(picture.getpixel((i * side + 16, v * side + 16))) / 255
            torch.testing.assert_close(pixel, row[i, :, 0, 0], atol=0.03, rtol=0)
    assert picture.getpixel((side - 2, 16)) >= (240, 240, 240)  # between the views


def test_views_of_several_sizes_are_padded():
    recipe = recipes.recipe("multicrop", 32)
    sizes = [view.size for view in recipe]
    views = [torch.zeros(3, 3, size, size) for size in sizes]
    assert len(set(sizes)) > 1
    shown = tiles(views, recipe)
    assert shown.shape == (3, len(views) * (max(sizes) + GAP), 3 * (max(sizes) + GAP))


def test_a_resumed_run_draws_no_views(tmp_path):
    config = settings(tmp_path, recipe="mocov2", image_size=32, resume="checkpoint")
    board = Board(config, 3)
    board.views([torch.zeros(2, 3, 32, 32)] * 2, recipes.from_settings(config.views))
    board.close(False)
    assert events(tmp_path).Tags()["images"] == []
