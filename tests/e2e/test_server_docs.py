"""The page `/docs` in a real browser, on a real server without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, NO_CHROMIUM, Browser
from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.server.auth import hash_key

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a folder of prefixes, and a configuration with a key."""
    folder = tmp_path_factory.mktemp("docs")
    backbone = load_backbone(make_model(folder / MODEL), dtype="float32", device="cpu")
    (folder / "prefixes").mkdir()
    make_prefix(backbone, folder / "prefixes" / "pubs.safetensors", 0)
    (folder / "serve.toml").write_text(f'[keys.me]\nhash = "{hash_key("pt-me")}"\n')
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(folder / MODEL, folder / "prefixes", "--config", str(folder / "serve.toml"))
    yield server.wait()
    assert server.stop() == 0


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def try_out(page: Browser, operation: str) -> str:
    """Send an operation's request from the page; the status that it shows."""
    block = f"document.getElementById('operations-default-{operation}')"
    page.value(f"{block}.querySelector('button.opblock-summary-control').click()")
    for button in (".try-out__btn", ".execute"):
        page.until(f"{block}.querySelector('{button}') !== null")
        page.value(f"{block}.querySelector('{button}').click()")
    page.until(f"{block}.querySelector('.live-responses-table .response-col_status') !== null")
    status: str = page.value(f"{block}.querySelector('.live-responses-table tbody .response-col_status').textContent")
    return status.strip()[:3]


def shows_all(page: Browser, server: LiveServer) -> None:
    """Wait until the page shows every operation of the document."""
    paths = server.get("/openapi.json", key="pt-me")[1]["paths"]
    operations = sum(len(methods) for methods in paths.values())
    assert operations > 20
    page.until(f"document.querySelectorAll('.opblock').length === {operations}")


def open_with_key(browser: Browser, server: LiveServer, **options: Any) -> None:
    browser.open(f"{server.url}/healthz")
    browser.value("sessionStorage.setItem('key', 'pt-me')")
    browser.open(f"{server.url}/docs", **options)
    shows_all(browser, server)


def visible(page: Browser, selector: str) -> int:
    """The number of elements that take up room."""
    elements: int = page.value(f"[...document.querySelectorAll('{selector}')].filter(e => e.offsetWidth).length")
    return elements


def test_shows_and_tries_the_interface_from_this_server_only(browser: Browser, server: LiveServer) -> None:
    open_with_key(browser, server)
    assert try_out(browser, "list_models") == "200"
    assert try_out(browser, "show_status") == "200"
    # A body with its schema, and the models below.
    browser.value("document.querySelector('#operations-default-chat .opblock-summary-control').click()")
    browser.until("document.querySelector('#operations-default-chat .model-example') !== null")
    browser.value("document.querySelector('#operations-default-chat [data-name=model]').click()")
    browser.until("document.querySelector('#operations-default-chat').textContent.includes('max_completion_tokens')")
    # Without a network there is nothing else to load; the policy allows nothing else either.
    assert {url for url in browser.requests() if not url.startswith(("data:", f"{server.url}/"))} == set()
    assert browser.complaints() == []
    assert browser.value("localStorage.length + document.cookie.length") == 0


def test_asks_for_a_key(browser: Browser, server: LiveServer) -> None:
    browser.open(f"{server.url}/docs")
    browser.until("document.body.textContent.includes('Failed to load API definition')")
    assert visible(browser, "#key-form")
    browser.value("document.getElementById('key').value = 'pt-me'; document.querySelector('#key-form button').click()")
    shows_all(browser, server)


def test_only_the_page_and_its_files_need_no_key(server: LiveServer) -> None:
    status, page, headers = server.get("/docs")
    assert status == 200
    assert "pt-me" not in page
    assert "default-src 'none'" in headers["content-security-policy"]
    for name, kind in (("swagger-ui-bundle.js", "text/javascript"), ("swagger-ui.css", "text/css")):
        status, _, headers = server.get(f"/docs/{name}")
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
    for path in ("/", "/docs"):
        assert "  " not in server.get(path)[2]["content-security-policy"]
    assert server.get("/docs/redoc.standalone.js")[0] == 404
    assert server.get("/docs/..%2Fcore.py")[0] == 404
    assert server.get("/openapi.json")[0] == 401
