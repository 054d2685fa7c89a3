"""The book as a site: every page of the repository is in it, every link leads somewhere, and nothing on it comes from elsewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parent.parent
BOOK = [
    "SUMMARY.md",
    *(
        f"{folder}/*.md"
        for folder in ("docs", "docs/posts", "notebooks", "reports", "reports/weeks", "reports/cards", "reports/benchmarks")
    ),
]


def built(project: Path, site: Path) -> Path:
    """`make docs`: raises Abort where mkdocs or its link checker has anything to say."""
    build(load_config(str(project / "mkdocs.yml"), site_dir=str(site), strict=True))
    return site


def page(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "lxml")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("site"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of one page and one module."""
    for name in ("mkdocs.yml", "docs/site/hooks.py", "docs/site/site.css"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "reports").mkdir()
    (tmp_path / "SUMMARY.md").write_text("# Summary\n\n## In short\n")
    (tmp_path / "module.py").write_text('"""What it does."""\n')
    return tmp_path


def test_every_page_of_the_book_is_on_the_site(site: Path) -> None:
    pages = [path.relative_to(ROOT) for pattern in BOOK for path in ROOT.glob(pattern)]
    assert [page for page in pages if page.name != "README.md" and not (site / page.with_suffix(".html")).exists()] == []
    assert page(site / "index.html").h1.text.startswith("LLM from scratch")


def test_the_menu_leads_to_weeks_posts_and_lessons(site: Path) -> None:
    menu = [link["href"] for link in page(site / "index.html").nav.find_all("a", href=True)]
    menu += [link["href"] for link in page(site / "index.html").select(".md-sidebar--primary a[href]")]
    assert {"reports/report.html", "reports/weeks/week_12.html", "docs/posts/honesty_gate.html", "notebooks/week_01.ipynb.html"} <= set(
        menu
    )


def test_nothing_that_a_page_loads_comes_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|video|source|link)\b[^>]*>", path.read_text(encoding="utf-8"))
        assert [tag for tag in tags if re.search(r"""(src|href)=["']?(https?:)?//""", tag)] == [], path


def test_a_number_of_the_report_stands_in_a_table(site: Path) -> None:
    """Where Markdown of GitHub and of mkdocs differ, a table is left as text with bars in it."""
    for path in site.glob("reports/*/*.html"):
        for block in page(path).select("article p"):
            assert not re.search(r"^\|.*\|$", block.text, re.MULTILINE), path


def test_a_module_that_a_page_links_to_is_shown_and_a_folder_is_listed(project: Path) -> None:
    (project / "README.md").write_text("# Title\n\nSee [it](module.py) and [all](.).\n[Notes](notebooks/).\n")
    site = built(project, project / "site")
    links = [link["href"] for link in page(site / "index.html").article.find_all("a", class_=None)]
    assert {"module.py.html", "notebooks/index.html"} <= set(links)
    assert "What it does." in page(site / "module.py.html").article.text


@pytest.mark.parametrize(
    "dead",
    [
        "[gone](gone.md)",
        "[gone](gone/)",
        "[gone](SUMMARY.md#at-length)",
        "[gone](#nowhere)",
        "![gone](gone.png)",
        '<a href="gone.html">gone</a>',
        '<img src="gone.png">',
        '<a href="SUMMARY.html#at-length">gone</a>',
    ],
)
def test_a_dead_link_fails_and_is_named(dead: str, project: Path, caplog: pytest.LogCaptureFixture) -> None:
    (project / "README.md").write_text(f"# Title\n\n{dead}\n")
    with pytest.raises(Abort):
        built(project, project / "site")
    (named,) = re.findall(r"[\w.#-]*(?:gone\.\w+|gone/|#[\w-]+)", dead)
    assert named in caplog.text


@pytest.mark.parametrize("alive", ["[short](SUMMARY.md#in-short)", '<a href="SUMMARY.html#in-short">short</a>', "[code](module.py)"])
def test_a_link_that_leads_somewhere_passes(alive: str, project: Path) -> None:
    (project / "README.md").write_text(f"# Title\n\n{alive}\n")
    assert (built(project, project / "site") / "index.html").exists()
