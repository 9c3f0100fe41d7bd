"""`make site`'s command builds the pages without a warning; a broken link is one; the first page works in a browser."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import prefixtune
from browser import CHROMIUM, NO_CHROMIUM
from forked_command import forking_python

ROOT = Path(__file__).resolve().parents[2]


def build(docs, site):
    options = ["-W", "-n", "--keep-going", "-q", "-b", "html"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [forking_python(), "-m", "sphinx", *options, str(docs), str(site)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", site)
    assert done.returncode == 0, done.stderr
    return site


def test_every_page_is_reachable_and_nothing_comes_from_elsewhere(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?!a\b)\w[^>]*?\bsrc\s*=\s*[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link\b[^>]*?\bhref\s*=\s*[\"']?([^\"'\s>]+)", text)
        assert loaded, page
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))], page


def test_links_lead_to_pages_and_to_files_of_the_repository(site):
    text = (site / "how_it_works.html").read_text(encoding="utf-8")
    assert 'href="contributing.html"' in text
    assert "<math" in text
    deploy = (site / "deploy.html").read_text(encoding="utf-8")
    copies = {(site / copy).read_bytes() for copy in re.findall(r'href="(_downloads/[^"]*/test_vllm\.py)"', deploy)}
    assert (ROOT / "tests" / "integrations" / "test_vllm.py").read_bytes() in copies


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    assert [name for name in prefixtune.__all__ if f'id="prefixtune.{name}"' not in pages] == ["__version__"]


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_page_in_a_browser(site, browser, scheme):
    browser.open(site / "index.html", scheme=scheme)
    assert browser.value("document.querySelector('h1').innerText").startswith("prefixtune")
    links = browser.value("[...document.querySelectorAll('.sidebar-tree a')].map(link => link.getAttribute('href'))")
    assert {"cli.html", "api/index.html", "how_it_works.html", "tutorials/index.html"} <= set(links)
    assert not browser.complaints()
    assert all(request.startswith(("file:", "data:")) for request in browser.requests())


@pytest.mark.skipif(not CHROMIUM, reason=NO_CHROMIUM)
def test_the_search_finds_a_word_without_a_server(site, browser):
    browser.open(f"{(site / 'search.html').as_uri()}?q=reparameterization")
    browser.until("document.querySelectorAll('#search-results li').length > 0")
