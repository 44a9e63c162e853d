"""Build the documentation as `make docs` does, and check links and requests of its pages."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src")}


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif (tag, name) in LOADED:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", folder]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}


def test_every_document_is_a_page(site, pages):
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"quickstart"}
    assert documents <= {file.stem for file in pages if file.parent == site}
    assert site / "repository/configs/synco_200.yaml.html" in pages
    assert not list(site.glob("hooks*"))


def test_links_lead_to_pages_and_headings(site, pages):
    checked = 0
    for file, page in pages.items():
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or link.startswith("data:"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()) and target.exists(), f"{file}: {link}"
            if parts.fragment and target.suffix == ".html":
                anchors = pages[site / target.relative_to(site.resolve())].anchors
                assert unquote(parts.fragment) in anchors, f"{file}: {link}"
            checked += 1
    assert checked > 1000


def test_pages_load_nothing_from_other_servers(site, pages):
    for file, page in pages.items():
        for loaded in page.loaded:
            assert not urlsplit(loaded).netloc, f"{file} loads {loaded}"
    for sheet in site.rglob("*.css"):
        assert "@import" not in sheet.read_text() and "url(http" not in sheet.read_text()


def test_the_notebook_is_shown_with_its_results(site):
    page = (site / "quickstart.html").read_text()
    assert "Compare with a random encoder" in page and "main_synco.py" in page
    assert page.count("<img") >= 3


def test_a_link_without_a_target_fails(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    config = tmp_path / "mkdocs.yml"
    _, key, checks = (ROOT / "mkdocs.yml").read_text().partition("\nvalidation:")
    config.write_text(f"site_name: test{key}{checks}")
    for link, status in (("#here", 0), ("#there", 1), ("absent.md", 1)):
        page.write_text(f"# Here\n\n[link]({link})\n")
        done = build(tmp_path / "site", config)
        assert done.returncode == status, done.stderr
        assert status == 0 or link in done.stderr
