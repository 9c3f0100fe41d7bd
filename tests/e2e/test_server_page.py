"""The playground in a real browser, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from browser import CHROMIUM, NO_CHROMIUM, Browser
from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.server.auth import hash_key

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": ""}
LONG = 4000
"""Tokens of a text that is still written when the page looks."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("page")
    backbone = load_backbone(make_model(folder / MODEL, positions=4096), dtype="float32", device="cpu")
    prefixes = folder / "prefixes"
    prefixes.mkdir()
    for seed, (name, task) in enumerate((("pubs", "e2e"), ("other-pubs", "e2e"), ("facts", "webnlg"), ("bare", ""))):
        header: dict[str, Any] = {"task": task, "text_format": FORMAT} if task else {}
        make_prefix(backbone, prefixes / f"{name}.safetensors", seed, **header)
    keys = f'[keys.me]\nhash = "{hash_key("pt-me")}"\n[keys.few]\nhash = "{hash_key("pt-few")}"\nprefixes = ["pubs"]\n'
    (folder / "serve.toml").write_text(f"max_tokens = {LONG}\n{keys}")
    server = LiveServer(folder / MODEL, prefixes, "--config", str(folder / "serve.toml"))
    yield server.wait()
    server.stop()


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Browser:
    """The page with a key, models listed."""
    # Not the page itself, whose questions without a key would be answered later.
    browser.open(f"{server.url}/healthz")
    browser.value("sessionStorage.setItem('key', 'pt-me')")
    browser.open(f"{server.url}/")
    browser.until("document.querySelectorAll('#models input').length === 5")
    return browser


def choose(page: Browser, *names: str) -> None:
    """Have exactly these models chosen."""
    page.value("document.querySelectorAll('#models input:checked').forEach((box) => box.click())")
    for name in names:
        page.value(f"document.querySelector('#models input[value={name}]').click()")
    page.until(f"document.getElementById('count').textContent.startsWith('{len(names)} chosen')")


def write(page: Browser) -> None:
    page.value("document.getElementById('run').click()")
    page.until("/Done|failed/.test(document.getElementById('said').textContent)")


def outputs(page: Browser) -> dict[str, str]:
    outputs_by_model: dict[str, str] = page.value(
        "Object.fromEntries([...document.querySelectorAll('.output')].map((each) => "
        "[each.querySelector('h3').textContent, each.querySelector('.text').textContent]))"
    )
    return outputs_by_model


def use_mode(page: Browser, mode: str, selector: str) -> None:
    page.value(f"document.querySelector('[name=mode][value={mode}]').click()")
    page.until(f"document.querySelector('{selector}') !== null")


def test_loads_without_errors_and_from_this_server_only(page: Browser, server: LiveServer) -> None:
    assert page.complaints() == []
    assert {url for url in page.requests() if not url.startswith(("data:", f"{server.url}/"))} == set()
    assert page.value("document.querySelectorAll('script[src], link[rel=stylesheet], [style]').length") == 0


def test_without_a_key_the_page_asks_for_one(browser: Browser, server: LiveServer) -> None:
    browser.open(f"{server.url}/healthz")
    browser.value("sessionStorage.clear()")
    browser.open(f"{server.url}/")
    browser.until("document.getElementById('server').textContent.includes('API key')")
    browser.value("document.getElementById('key').value = 'pt-me'; document.querySelector('#key-form button').click()")
    browser.until("document.querySelectorAll('#models input').length === 5")
    assert browser.value("sessionStorage.getItem('key')") == "pt-me"
    assert browser.value("localStorage.length + document.cookie.length") == 0


def test_outputs_are_side_by_side_and_the_servers(page: Browser, server: LiveServer) -> None:
    choose(page, "pubs", "other-pubs", MODEL)
    page.until("document.querySelectorAll('#inputs input').length === 8")
    page.value("document.getElementById('max_tokens').value = '30'")
    write(page)
    shown = outputs(page)
    mr = "name[The Vaults], eatType[pub], priceRange[cheap], area[riverside]"
    for name in shown:
        more = {"format_of": "pubs"} if name == MODEL else {}
        body = {"mr": mr, "max_tokens": 30, **more}
        assert shown[name] == server.post(f"/v1/tasks/{name}", body, key="pt-me")[1]["output"]
    assert len(set(shown.values())) == 3
    tops = page.value("[...document.querySelectorAll('.output')].map((each) => each.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    assert page.value("document.querySelector('.facts').textContent").startswith("30 tokens")
    assert page.complaints() == []


def test_the_batch_is_seen_while_it_runs_and_can_be_stopped(page: Browser, server: LiveServer) -> None:
    choose(page, "pubs", "facts")
    use_mode(page, "prompt", "#inputs textarea")
    page.value("document.querySelector('#inputs textarea').value = 'x'")
    page.value(f"document.getElementById('max_tokens').value = '{LONG}'")
    page.value("document.getElementById('run').click()")
    page.until("document.querySelectorAll('#slots .busy').length === 2")
    assert page.value("document.getElementById('legend').textContent").count("×") == 2
    page.until("document.querySelector('.output .text').textContent.length > 5")
    assert page.value("document.querySelector('.output').getAttribute('aria-busy')") == "true"
    page.value("document.getElementById('halt').click()")
    page.until("document.querySelector('.facts').textContent === 'stopped'")
    page.until("document.getElementById('legend').textContent === 'idle'")
    assert server.get("/v1/status", key="pt-me")[1]["running"] == []


def test_forms_have_the_fields_of_the_task(page: Browser, server: LiveServer) -> None:
    choose(page, "facts")
    page.until("document.querySelectorAll('.triple').length === 2")
    page.value("document.querySelector('#inputs > button').click()")
    assert page.value("document.querySelectorAll('.triple').length") == 3
    page.value("document.querySelectorAll('.triple')[2].querySelector('button').click()")
    page.value("document.getElementById('max_tokens').value = '20'")
    write(page)
    triples = [["Aarhus", "country", "Denmark"], ["Aarhus", "leaderName", "Jacob_Bundsgaard"]]
    body = {"triples": triples, "max_tokens": 20}
    assert outputs(page) == {"facts": server.post("/v1/tasks/facts", body, key="pt-me")[1]["output"]}
    # A prefix that tells of no fields.
    choose(page, "bare")
    page.until("document.getElementById('about').textContent.startsWith('None of the chosen')")
    use_mode(page, "chat", "#inputs textarea")
    write(page)
    assert outputs(page)["bare"]


def test_chosen_prefixes_are_joined_in_the_order_of_choice(page: Browser, server: LiveServer) -> None:
    choose(page, "other-pubs", MODEL, "pubs")
    page.value("document.getElementById('max_tokens').value = '20'")
    page.value("document.getElementById('join').click()")
    page.until("document.getElementById('count').textContent.endsWith('joined: other-pubs + pubs')")
    page.until("document.querySelectorAll('#inputs input').length === 8")
    write(page)
    shown = outputs(page)
    mr = "name[The Vaults], eatType[pub], priceRange[cheap], area[riverside]"
    body = {"mr": mr, "max_tokens": 20}
    bare = {**body, "format_of": "other-pubs+pubs"}
    assert shown == {
        "other-pubs+pubs": server.post("/v1/tasks/other-pubs+pubs", body, key="pt-me")[1]["output"],
        MODEL: server.post(f"/v1/tasks/{MODEL}", bare, key="pt-me")[1]["output"],
    }
    use_mode(page, "prompt", "#inputs textarea")
    page.value("document.querySelector('#inputs textarea').value = 'x'")
    write(page)
    prompt = {"prompt": "x", "max_tokens": 20, "temperature": 0}
    answer = server.post("/v1/completions", {"model": "other-pubs+pubs", **prompt}, key="pt-me")[1]
    assert outputs(page)["other-pubs+pubs"] == answer["choices"][0]["text"]
    # With one prefix there is nothing to join; without the tick, each writes by itself.
    choose(page, "pubs")
    assert "joined" not in page.value("document.getElementById('count').textContent")
    choose(page, "pubs", "facts")
    page.value("document.getElementById('join').click()")
    write(page)
    assert set(outputs(page)) == {"pubs", "facts"}
    assert page.complaints() == []


def test_an_error_is_shown_in_place_of_the_output(page: Browser) -> None:
    choose(page, "pubs", "facts")
    # Fields of pubs, which facts has not.
    page.until("document.querySelectorAll('#inputs input').length === 8")
    write(page)
    shown = outputs(page)
    assert "mr" in shown["facts"]
    assert shown["pubs"]
    assert page.value("document.getElementById('said').textContent") == "1 of 2 failed."
    assert page.value("document.querySelectorAll('.output .error').length") == 1


def test_generated_text_is_never_executed(page: Browser) -> None:
    attack = "<img src=x onerror='window.attacked = true'><script>window.attacked = true</script>"
    stream = f"data: {json.dumps({'delta': attack})}\n\ndata: [DONE]\n\n"
    page.value(f"window.fetch = async () => new Response({json.dumps(stream)})")
    write(page)
    assert "<img src=x" in next(iter(outputs(page).values()))
    assert page.value("window.attacked") is None
    assert page.value("document.querySelectorAll('.output img, .output script').length") == 0


def test_the_keyboard_is_enough(page: Browser) -> None:
    page.press("Tab", 9)
    assert page.value("document.activeElement.className") == "skip"
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    reached = []
    for _ in range(40):
        page.press("Tab", 9)
        reached.append(
            page.value("document.activeElement.id || document.activeElement.name || document.activeElement.value")
        )
        if reached[-1] == "run":
            break
    assert {"key", "filter", "mode", "temperature", "seed", "stop", "run"} <= set(reached)
    page.press("Enter", 13)
    page.until("document.getElementById('said').textContent === 'Done.'")
    assert outputs(page)


def test_everything_has_an_accessible_name(page: Browser) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node.get("ignored")]
    names = {(node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "").strip()) for node in seen}
    roles = {role for role, _ in names}
    assert {"main", "banner", "heading", "checkbox", "radio", "radiogroup", "searchbox", "status", "region"} <= roles
    for role in ("button", "textbox", "searchbox", "checkbox", "radio", "spinbutton", "region", "form"):
        assert (role, "") not in names, role
