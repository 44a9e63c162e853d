"""Prepare the pages of the site that mkdocs.yml describes.

Pages link to files outside docs/, such as ../configs/synco_200.yaml. On a repository's host, these
links work as they are. The site gets a copy of each linked file in `repository/`: Markdown files
as pages, other files as pages with highlighted code. Links to them are changed accordingly. The
notebook becomes a page, too.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "docs/quickstart.ipynb"
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")  # in the navigation
# Markdown links, and attributes of HTML; code is skipped
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s]+)')
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.S | re.M)


def on_config(config: MkDocsConfig) -> None:
    """Name headings' anchors as repository hosts do: each space becomes a hyphen."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebook's page and pictures, and the files outside docs/ that pages link to."""
    text, resources = MarkdownExporter().from_filename(str(ROOT / NOTEBOOK))
    files.append(File.generated(config, site_path(NOTEBOOK), content=text))
    for name, picture in resources["outputs"].items():
        files.append(File.generated(config, name, content=picture))

    pages = list(files.documentation_pages())
    for page in pages:  # the loop appends the new pages to this list
        linked = (repository_path(match[2], page.src_uri) for match in links(page.content_string))
        in_navigation = ALWAYS if page.src_uri == "index.md" else ()
        for path in (*in_navigation, *linked):
            outside = path and not path.startswith("docs/")
            if outside and not files.get_file_from_path(site_path(path)):
                files.append(File.generated(config, site_path(path), content=content(path)))
                pages += [files.get_file_from_path(site_path(path))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to the pages of the site; give the front page its full width."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]
    here = posixpath.dirname(page.file.src_uri)

    def changed(match: re.Match) -> str:
        path = repository_path(match[2], page.file.src_uri)
        if path is None:
            return match[0]
        anchor = "".join(match[2].partition("#")[1:])
        return match[1] + posixpath.relpath(site_path(path), here) + anchor

    pieces = CODE.split(markdown)
    return "".join(piece if i % 2 else LINK.sub(changed, piece) for i, piece in enumerate(pieces))


def links(markdown: str) -> list[re.Match]:
    """Return the links of a page, as matches of `LINK`."""
    return [match for text in CODE.split(markdown)[::2] for match in LINK.finditer(text)]


def repository_path(target: str, page: str) -> str | None:
    """Return the path in the repository that a page links to; None for all other links.

    Args:
        target: the target of the link, relative to the page's file in the repository.
        page: path of the page in the site.
    """
    target = target.partition("#")[0]
    file = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    return path if target and ":" not in target and (ROOT / path).exists() else None


def site_path(path: str) -> str:
    """Return the path in the site of a file or folder of the repository."""
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def content(path: str) -> str:
    """Return the Markdown of the page of a file or folder outside docs/."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(str(inner.relative_to(file)) for inner in file.rglob("*.*"))
        title, body = path, "\n".join(f"- [{name}]({name})" for name in names)
    elif file.suffix == ".md":
        return file.read_text()
    else:
        title, body = path, f"````{file.suffix[1:]}\n{file.read_text()}\n````"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {title}\n\n{body}\n"
