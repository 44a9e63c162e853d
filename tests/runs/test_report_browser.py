"""Reports in a real browser: no error, no request, no small text, no empty panel, no wide page.

They need Chromium; `make test-browser` says how to install it.
"""

import functools
import io
import shutil

import numpy as np
import pytest
from conftest import in_process, write_images
from PIL import Image
from report_helpers import LOGGED, Page, made, write_run
from run_helpers import TINY
from voc_tree import write_voc

from moco.report import negatives
from moco.report.options import Options

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
]
SMALLEST = 11  # pixels
WIDTHS = {"laptop": (1366, 768), "phone": (390, 844)}

# the text in the page, its size on the screen, and whether its picture cuts it off
TEXTS = """() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.data.trim(), of = walk.currentNode.parentElement;
    if (!text || !of.checkVisibility()) continue;
    const svg = of.closest("svg"), m = svg && of.getScreenCTM();
    const scale = svg ? Math.hypot(m.a, m.b) : 1;
    const box = of.getBoundingClientRect(), out = svg && svg.getBoundingClientRect();
    found.push({
      text, size: scale * parseFloat(getComputedStyle(of).fontSize),
      cut: !!svg && (box.left < out.left - 2 || box.right > out.right + 2 ||
                     box.top < out.top - 2 || box.bottom > out.bottom + 2),
    });
  }
  return found;
}"""

# for each table without merged cells, the number of filled cells of each column
COLUMNS = """() => [...document.querySelectorAll("table:not(.views)")].map(table =>
  [...table.tHead.rows[0].cells].map((head, i) =>
    [...table.tBodies[0].rows].filter(row => row.cells[i].textContent.trim()).length))"""

BROKEN = "() => [...document.images].filter(image => !image.naturalWidth).length"
SCROLLED = "() => [document.documentElement.scrollWidth, innerWidth]"


def one_run(folder):
    data = write_images(folder / "images", classes=3, train=6)
    return [write_run(folder / "a_run_with_a_long_name_1234567890", data, logged=LOGGED)]


def four_runs(folder):
    data = write_images(folder / "images", classes=3, train=6)
    logged = (LOGGED, LOGGED[:9], ("loss", "lr", "u"), ("loss", "cosine", "fn_found"))
    return [
        write_run(folder / f"run_{i}", data, logged=names, lr=0.01 * i, lines=30 + 200 * i)
        for i, names in enumerate(logged)
    ]


def without_labels(folder):
    (folder / "flat").mkdir()
    for i, file in enumerate((write_images(folder / "images") / "train").rglob("*.jpg")):
        shutil.copy(file, folder / "flat" / f"{i}.jpg")
    logged = ("loss", "alignment", "uniformity", "feature_std")
    return [write_run(folder / "run", folder / "flat", lines=9, logged=logged)]


def just_started(folder):
    return [write_run(folder / "run", write_images(folder / "images"), lines=0, weights=False)]


def multi_label(folder):
    data = write_voc(folder / "voc", trainval=30, test=20)
    return [write_run(folder / "run", data, dataset="voc2007", logged=LOGGED[:3])]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no package playwright")
    with sync_api.sync_playwright() as playwright:
        # the sandbox does not work in containers, and the page is our own
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def a_report(folder, runs):
    return made(runs(folder), folder, images=30)


def negatives_of_a_run(folder):
    """The page of tools/negatives.py about two checkpoints of SynCo."""
    data = write_images(folder / "images", classes=3, train=12)
    words = ("--epochs", 2, "--keep", "all", "-j", 0, "--warmup-epochs", 0, *("--n2", 2, "--n5", 2))
    status, _, err = in_process("main_synco", data, *TINY, *words, "--save-dir", folder / "run")
    assert status == 0, err
    files = sorted((folder / "run").glob("checkpoint_*"))
    negatives.write(files, folder / "page.html", Options(str(data), queries=20))
    return Page(folder / "page.html")


REPORTS = {
    of.__name__: functools.partial(a_report, runs=of)
    for of in (one_run, four_runs, without_labels, just_started, multi_label)
}


@pytest.mark.parametrize(
    "make", [*REPORTS.values(), negatives_of_a_run], ids=[*REPORTS, "negatives"]
)
def test_a_report_in_a_browser(make, browser, tmp_path):
    report = make(tmp_path)
    address = (tmp_path / "page.html").as_uri()
    for name, (width, height) in WIDTHS.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        messages, requests = [], []
        page.on("console", lambda message, to=messages: to.append(message.text))
        page.on("pageerror", lambda error, to=messages: to.append(str(error)))
        page.on("request", lambda request, to=requests: to.append(request.url))
        page.goto(address)
        assert messages == []
        assert [url for url in requests if not url.startswith("data:")] == [address]

        texts = page.evaluate(TEXTS)
        assert len(texts) > 10
        assert [one for one in texts if one["size"] < SMALLEST] == []
        assert [one["text"] for one in texts if one["cut"]] == []
        columns = page.evaluate(COLUMNS)
        assert columns and all(all(filled) for filled in columns)
        assert page.evaluate(BROKEN) == 0
        content, window = page.evaluate(SCROLLED)
        assert content <= window == width
        if name == "laptop":
            figures = page.query_selector_all("figure")
            assert len(figures) == len(report.titles)
            for figure, title in zip(figures, report.titles, strict=True):
                assert ink(figure) > 0.003, title
        page.close()


def ink(figure):
    """Return the fraction of pixels of a panel, below its title, that are not its background."""
    shown = Image.open(io.BytesIO(figure.screenshot())).convert("L")
    pixels = np.asarray(shown)[35:-5, 5:-5]
    return (pixels < 200).mean()


def test_the_browser_finds_what_is_wrong(browser):
    """The checks above fail for a page with small text, an empty column, and a wide table."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_content(
        "<p style='font-size:10px'>small</p><figure style='width:600px;height:100px'></figure>"
        "<table><thead><tr><th>a<th>b</thead><tbody><tr><td>1<td></tbody></table>"
        "<svg width=100 height=50 viewBox='0 0 200 100'><text x=150 y=50>scaled, cut</text></svg>"
    )
    texts = {one["text"]: one for one in page.evaluate(TEXTS)}
    assert texts["small"]["size"] == 10 and texts["scaled, cut"]["size"] == 8
    assert texts["scaled, cut"]["cut"] and not texts["small"]["cut"]
    assert page.evaluate(COLUMNS) == [[1, 0]] and ink(page.query_selector("figure")) == 0
    content, window = page.evaluate(SCROLLED)
    assert content > window
    page.close()
