"""The page for training in a real browser, on a real server with a real worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from browser import CHROMIUM, NO_CHROMIUM, Browser
from contrast import contrast
from live_server import MODEL, LiveServer, make_model
from prefixtune.server.auth import hash_key

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

ATTACK = "<img src=x onerror='window.attacked = true'>"
CHATS = [
    [{"role": "user", "content": f"train {number} {ATTACK}"}, {"role": "assistant", "content": f"at {number} o'clock"}]
    for number in range(240)
]
ALL_ROWS = [json.dumps({"messages": messages}) + "\n" for messages in CHATS]
ROWS = "".join(ALL_ROWS[:12])
LASTING_ROWS = "".join(ALL_ROWS)
"""So many that none is held out, by which training might end early, and that 1,000 epochs, the most there are, last."""
SECONDS = 120


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("train")
    rules = "max_steps = 100_000\n"
    keys = "".join(f'[keys.{name}]\nhash = "{hash_key(f"pt-{name}")}"\n{rules}' for name in ("me", "other", "acme"))
    keys += 'prefixes = ["acme-*"]\n'
    (folder / "serve.toml").write_text(keys)
    (folder / "prefixes").mkdir()
    flags = ("--config", str(folder / "serve.toml"), "--data-folder", str(folder / "data"))
    server = LiveServer(make_model(folder / MODEL), folder / "prefixes", *flags)
    yield server.wait()
    server.stop()


def open_page(browser: Browser, server: LiveServer, key: str = "pt-me", **options: Any) -> Browser:
    """The page with a key, jobs listed."""
    browser.open(f"{server.url}/healthz")
    browser.value(f"sessionStorage.setItem('key', '{key}')")
    browser.open(f"{server.url}/train", **options)
    browser.until("document.getElementById('server').textContent.startsWith('training on')")
    return browser


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Browser:
    return open_page(browser, server)


def text(page: Browser, element: str) -> str:
    return str(page.value(f"document.getElementById('{element}').textContent"))


def says(page: Browser, element: str, words: str) -> None:
    """Wait until an element says something."""
    page.until(f"document.getElementById('{element}').textContent.includes({json.dumps(words)})", SECONDS)


def click(page: Browser, element: str, words: str = "") -> None:
    """Click on an element, or on the button in it that says something, as soon as it is there and can be used."""
    found = f"document.getElementById('{element}')"
    if words:
        buttons = f"[...{found}.querySelectorAll('button')]"
        found = f"{buttons}.find((one) => one.textContent.startsWith('{words}'))"
    page.until(f"((one) => one && !one.disabled && (one.click(), true))({found})")


def give(page: Browser, name: str, content: str, field: str = "file") -> None:
    """Choose a file, as its field's dialog does."""
    page.value(
        "{ const files = new DataTransfer(); "
        f"files.items.add(new File([{json.dumps(content)}], {json.dumps(name)})); "
        f"const field = document.getElementById('{field}'); field.files = files.files; "
        "field.dispatchEvent(new Event('change')); }"
    )


def start(page: Browser, name: str, **settings: str) -> None:
    """Start a job on the chats."""
    give(page, "chats.jsonl", ROWS)
    begin(page, name, **settings)


def begin(page: Browser, name: str, **settings: str) -> None:
    """Start a job on the file that was chosen."""
    page.until("!document.getElementById('start').disabled", SECONDS)
    for field, value in {"name": name, "prefix-length": "4", **settings}.items():
        page.value(f"document.getElementById('{field}').value = '{value}'")
    click(page, "start")
    says(page, "start-said", "Started.")
    says(page, "job-title", name)


def test_without_a_key_the_page_asks_for_one(browser: Browser, server: LiveServer) -> None:
    browser.open(f"{server.url}/healthz")
    browser.value("sessionStorage.clear()")
    browser.open(f"{server.url}/train")
    says(browser, "list-said", "API key")
    browser.value("document.getElementById('key').value = 'pt-me'; document.querySelector('#key-form button').click()")
    says(browser, "list-said", "No jobs yet.")
    assert {url for url in browser.requests() if not url.startswith(("data:", f"{server.url}/"))} == set()
    assert browser.value("document.querySelectorAll('script[src], link[rel=stylesheet], [style]').length") == 0
    assert browser.value("localStorage.length + document.cookie.length") == 0


def test_pages_link_to_each_other(page: Browser, server: LiveServer) -> None:
    assert page.value("document.querySelector('#pages a').pathname") == "/"
    page.open(f"{server.url}/")
    assert page.value("document.querySelector('#pages a').pathname") == "/train"


def test_an_error_in_a_file_is_shown_with_its_row(page: Browser) -> None:
    give(page, "chats.jsonl", ROWS + '{"messages": "nothing"}\n')
    says(page, "file-said", "line 13")
    assert page.value("document.getElementById('file-said').className") == "error"
    assert page.value("document.getElementById('start').disabled")
    give(page, "notes.txt", " ")
    says(page, "file-said", "no words")


def test_how_long_it_takes_is_said_before_the_start(page: Browser) -> None:
    give(page, "notes.txt", "The tower was built in 1887. It is 300 metres high.")
    says(page, "takes", "is shown after the first step: before it, questions and answers are made.")


def test_from_a_file_to_an_answer(page: Browser, server: LiveServer) -> None:
    give(page, "chats.jsonl", ROWS)
    page.until("!document.getElementById('start').disabled", SECONDS)
    assert "12" in text(page, "facts")
    assert text(page, "file-said").startswith("chats.jsonl: read as chats")
    assert page.value("document.querySelector('#sample-text mark').textContent") == "at 0 o'clock"
    assert "Lengths" in text(page, "lengths")
    assert page.value("document.getElementById('name').value") == "chats"
    start(page, "clerk", epochs="4")
    page.until("document.querySelectorAll('#pairs dd').length === 6")
    says(page, "job-said", "clerk answers now.")
    page.until("document.querySelectorAll('#pairs dd.new').length === 3", SECONDS)
    pairs = page.value("[...document.querySelectorAll('#pairs dd')].map((cell) => cell.textContent)")
    asked = {"messages": CHATS[0][:1], "max_tokens": 120, "temperature": 0}
    for answer, model in zip(pairs, (MODEL, "clerk"), strict=False):
        body = server.post("/v1/chat/completions", {"model": model, **asked}, key="pt-me")[1]
        assert answer == body["choices"][0]["message"]["content"].strip()
    assert text(page, "curve-text").startswith("Loss ")
    assert len(page.value("document.querySelector('#curve .train').getAttribute('points')").split()) > 2
    # Its own question, to both.
    page.value("document.getElementById('own').value = 'train 99'")
    click(page, "question", "Ask")
    page.until("document.querySelectorAll('#pairs dd.new').length === 4", SECONDS)
    # What texts contain is shown, and never executed.
    assert page.value("window.attacked") is None
    assert page.value("document.querySelectorAll('main img').length") == 0
    # After a reload all of it is there.
    page.open(f"{server.url}/train")
    page.until("document.querySelectorAll('#pairs dd.new').length === 4", SECONDS)
    assert page.complaints() == []


def test_a_result_is_tried_downloaded_and_deleted(page: Browser, server: LiveServer) -> None:
    says(page, "job-said", "clerk answers now.")
    page.until("document.querySelector('#actions a') !== null", SECONDS)
    link = page.value("document.querySelector('#actions a').href")
    page.value("URL.createObjectURL = (blob) => { window.size = blob.size; return '#'; }")
    click(page, "actions", "Download")
    page.until("window.size > 0")
    headers = server.request("HEAD", "/v1/models/clerk/file", key="pt-me")[2]
    assert page.value("window.size") == int(headers["content-length"])
    page.open(link)
    page.until("document.querySelectorAll('#models input:checked').length === 2")
    assert page.value("document.querySelector('[name=mode]:checked').value") == "chat"
    # Another key sees nothing of it.
    open_page(page, server, "pt-other")
    says(page, "list-said", "No jobs yet.")
    open_page(page, server)
    says(page, "job-said", "clerk answers now.")
    click(page, "actions", "Delete")
    page.until("document.getElementById('sure').open")
    click(page, "sure-no")
    page.until("!document.getElementById('sure').open")
    assert server.get("/v1/models/clerk", key="pt-me")[0] == 200
    click(page, "actions", "Delete")
    page.until("document.getElementById('sure').open")
    click(page, "sure-yes")
    says(page, "actions", "clerk was deleted.")
    assert server.get("/v1/models/clerk", key="pt-me")[0] == 404


def test_a_job_is_paused_resumed_and_cancelled(page: Browser) -> None:
    give(page, "lasting.jsonl", LASTING_ROWS)
    begin(page, "long", epochs="1000")
    says(page, "bar-text", "Step")
    click(page, "actions", "Pause")
    says(page, "job-said", "Paused")
    click(page, "actions", "Resume")
    says(page, "jobs", "long")
    page.until("/waits|trains/.test(document.getElementById('job-said').textContent)", SECONDS)
    click(page, "actions", "Cancel")
    page.until("document.getElementById('sure').open")
    click(page, "sure-yes")
    says(page, "job-said", "Cancelled.")
    assert page.value("document.querySelector('#jobs [aria-current]').textContent").startswith("longcancelled")


def test_an_address_of_a_job_that_is_gone_shows_the_others(browser: Browser, server: LiveServer) -> None:
    for key, words in (("pt-me", "long"), ("pt-other", "No jobs yet.")):
        browser.open(f"{server.url}/healthz")
        browser.value(f"sessionStorage.setItem('key', '{key}')")
        browser.open(f"{server.url}/train#ftjob-0123456789abcdef01234567")
        says(browser, "list", words)
        shown = browser.value("location.hash")
        assert "0123456789" not in shown
        assert browser.value("document.getElementById('job').hidden") is not shown.startswith("#ftjob-")


def test_a_key_without_the_backbone_trains_it(browser: Browser, server: LiveServer) -> None:
    page = open_page(browser, server, "pt-acme")
    for bases in ([MODEL], [MODEL, "acme-1"]):
        name = f"acme-{len(bases)}"
        start(page, name, epochs="1")
        assert page.value("[...document.querySelectorAll('#base option')].map((one) => one.value)") == bases
        says(page, "job-said", f"{name} answers now.")
    listed = server.get("/v1/fine_tuning/jobs", key="pt-acme")[1]["data"]
    assert [job["model"] for job in listed] == [MODEL, MODEL]


def test_what_fails_for_now_is_asked_again(browser: Browser, server: LiveServer) -> None:
    page = open_page(browser, server, "pt-acme")
    page.until("document.querySelectorAll('#pairs dd.new').length === 3", SECONDS)
    page.value(
        "Object.keys(sessionStorage).filter((one) => one !== 'key').forEach((one) => sessionStorage.removeItem(one))"
    )
    # Every answer, and the models when they are looked up for the job.
    busy = """{
      const send = window.fetch;
      let models = 0;
      const isBusy = (path) =>
        (!window.free && path.includes("completions")) || (path === "/v1/models" && ++models === 2);
      window.fetch = async (path, options) =>
        isBusy(path) ? new Response('{"error": {"message": "busy"}}', { status: 503 }) : send(path, options);
    }"""
    added = page.call("Page.addScriptToEvaluateOnNewDocument", source=busy)
    page.open(f"{server.url}/train")
    page.until("[...document.querySelectorAll('#pairs dd')].filter((one) => one.textContent === '(busy)').length === 6")
    page.until("document.querySelector('#actions a') !== null")
    page.value("window.free = true")
    page.until("document.querySelectorAll('#pairs dd.new').length === 3", SECONDS)
    assert "(busy)" not in text(page, "pairs")
    page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


def test_an_older_job_does_not_take_a_later_ones_model_for_its_own(page: Browser, server: LiveServer) -> None:
    start(page, "twice", epochs="1")
    says(page, "job-said", "twice answers now.")
    server.request("DELETE", "/v1/models/twice", key="pt-me")
    start(page, "twice", epochs="1")
    says(page, "job-said", "twice answers now.")
    first, second = [job["id"] for job in server.get("/v1/fine_tuning/jobs", key="pt-me")[1]["data"][:2]][::-1]
    page.value(f"document.querySelector('#jobs button[value={first}]').click()")
    says(page, "action-said", "twice was deleted.")
    page.value(f"document.querySelector('#jobs button[value={second}]').click()")
    page.until("document.querySelector('#actions a') !== null")


def test_a_job_does_not_start_without_the_validation_file_that_is_being_sent(page: Browser) -> None:
    give(page, "chats.jsonl", ROWS)
    page.until("!document.getElementById('start').disabled", SECONDS)
    page.value("{ window.send = XMLHttpRequest.prototype.send; XMLHttpRequest.prototype.send = () => {}; }")
    give(page, "valid.jsonl", ROWS, "validation-file")
    click(page, "start")
    says(page, "start-said", "The validation file is not there yet")
    page.value("XMLHttpRequest.prototype.send = window.send")
    give(page, "valid.jsonl", ROWS, "validation-file")
    says(page, "validation-said", "valid.jsonl")
    # The list of files is read again with the next one.
    give(page, "chats.jsonl", ROWS)
    label = "document.querySelector('#files button[aria-label=\"Delete valid.jsonl\"]')"
    page.until(f"{label} !== null", SECONDS)
    page.value(f"{label}.click()")
    says(page, "validation-said", "valid.jsonl was deleted.")


def test_a_wrong_value_in_closed_settings_is_shown(page: Browser) -> None:
    give(page, "chats.jsonl", ROWS)
    page.until("!document.getElementById('start').disabled", SECONDS)
    assert not page.value("document.getElementById('settings').open")
    page.value("document.getElementById('prefix-length').value = '0'")
    click(page, "start")
    says(page, "start-said", "Prefix length: ")
    assert page.value("document.getElementById('settings').open")
    assert page.value("document.activeElement.id") == "prefix-length"


def test_another_tab_asks_about_a_document(page: Browser, server: LiveServer) -> None:
    asked = "[...document.querySelectorAll('#pairs .asked')].map((one) => one.textContent)"
    give(page, "tower.txt", "The tower was built in 1887. It is 300 metres high. " * 9)
    page.value("document.querySelector('[name=questions][value=file]').click()")
    # So many that the job still trains when it is cancelled.
    questions = "".join(f"How high is part {number}?,{number} metres\n" for number in range(100))
    give(page, "questions.csv", f"question,answer\n{questions}", "questions-file")
    says(page, "questions-said", "questions.csv")
    begin(page, "tower", epochs="1000")
    page.until("document.querySelectorAll('#pairs dd:not(.wait)').length === 3", SECONDS)
    usual = page.value(asked)
    assert usual[0] == "What is this text about?"
    forget = "sessionStorage.removeItem(`pairs ${location.hash.slice(1)}`)"
    page.value(forget)
    page.open(f"{server.url}/train")
    says(page, "job-title", "tower")
    page.until("document.querySelectorAll('#pairs .asked').length === 3")
    assert page.value(asked) == usual
    # A job without a result compares nothing, and asks nothing.
    job = server.get("/v1/fine_tuning/jobs", key="pt-me")[1]["data"][0]["id"]
    server.post(f"/v1/fine_tuning/jobs/{job}/cancel", {}, key="pt-me")
    says(page, "job-said", "Cancelled.")
    page.value(forget)
    page.open(f"{server.url}/healthz")
    page.open(f"{server.url}/train#{job}")
    says(page, "job-said", "Cancelled.")
    page.value("fetch('/healthz').then(() => { window.answered = true; })")
    page.until("window.answered")
    assert not [url for url in page.requests() if url.endswith("completions")]


def test_what_the_server_refuses_is_said(page: Browser) -> None:
    give(page, "chats.jsonl", ROWS)
    page.until("!document.getElementById('start').disabled", SECONDS)
    page.value(f"document.getElementById('name').value = '{MODEL}'")
    click(page, "start")
    page.until("document.getElementById('start-said').className === 'error'")
    assert MODEL in text(page, "start-said")
    page.value("window.fetch = async () => { throw new TypeError('gone'); }")
    click(page, "key-form", "Use")
    says(page, "list-said", "The server does not respond. Tried again in")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_never_wider_than_the_window(browser: Browser, server: LiveServer, width: int) -> None:
    page = open_page(browser, server, width=width)
    start(page, f"wide{width}")
    give(page, f"{'long' * 30}.md", f"{'word' * 50} " * 20)
    page.until("!document.getElementById('start').disabled", SECONDS)
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page.until("document.querySelectorAll('#jobs button').length > 0")
    assert page.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [width, width]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_are_legible(browser: Browser, server: LiveServer, scheme: str) -> None:
    page = open_page(browser, server, scheme=scheme)
    give(page, "chats.jsonl", ROWS)
    page.until("document.querySelector('#sample-text mark') !== null", SECONDS)
    colors = page.value(
        "Object.fromEntries(['--page', '--sheet', '--text', '--quiet', '--bad', '--good', '--accent', '--edge', "
        "'--on-accent', '--marked', '--c1'].map((name) => [name, getComputedStyle(document.documentElement)"
        ".getPropertyValue(name).trim()]))"
    )
    for ground in ("--page", "--sheet"):
        for name in ("--text", "--quiet", "--bad", "--good", "--accent"):
            assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
        for name in ("--edge", "--c1"):
            assert contrast(colors[name], colors[ground]) >= 3, (name, ground)
    assert contrast(colors["--text"], colors["--marked"]) >= 4.5
    assert contrast(colors["--on-accent"], colors["--accent"]) >= 4.5


def test_the_keyboard_is_enough(page: Browser) -> None:
    give(page, "lasting.jsonl", LASTING_ROWS)
    page.until("!document.getElementById('start').disabled", SECONDS)
    page.value("document.body.focus(); document.getElementById('key').focus()")
    reached = []
    for _ in range(30):
        page.press("Tab", 9)
        reached.append(page.value("document.activeElement.id || document.activeElement.parentElement.id"))
        if reached[-1] == "start":
            break
    assert [name for name in ("file", "sample-text", "name", "settings", "start") if name in reached] == [
        "file", "sample-text", "name", "settings", "start",
    ]  # fmt: skip
    page.value(
        "document.getElementById('name').value = 'by-keyboard'; document.getElementById('epochs').value = '1000'"
    )
    page.press("Enter", 13)
    says(page, "job-title", "by-keyboard")
    # The new job has the focus, and is named by its title.
    page.until("document.activeElement.id === 'job'")
    click(page, "actions", "Cancel")
    page.until("document.activeElement.id === 'sure-no'")
    click(page, "sure-yes")
    says(page, "job-said", "Cancelled.")


def test_everything_has_an_accessible_name(page: Browser) -> None:
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node.get("ignored")]
    names = {(node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "").strip()) for node in seen}
    roles = {role for role, _ in names}
    assert {"main", "banner", "heading", "navigation", "textbox", "spinbutton", "combobox", "status", "region"} <= roles
    for role in ("button", "textbox", "combobox", "spinbutton", "region", "form", "image", "link"):
        assert (role, "") not in names, role
