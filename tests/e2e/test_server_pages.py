"""The pages in a real browser, on a real server with a real worker: the playground, `/train` and `/docs`.

Slow: Chromium starts, and a job trains to its end.
"""

import json

import pytest

from browser import CHROMIUM, NO_CHROMIUM
from contrast import contrast
from live_server import MODEL, fill_folder, serve

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": ""}
MR = "name[The Vaults], eatType[pub], priceRange[cheap], area[riverside]"
ATTACK = "<img src=x onerror='window.attacked = true'>"
CHATS = [
    [{"role": "user", "content": f"train {number} {ATTACK}"}, {"role": "assistant", "content": f"at {number} o'clock"}]
    for number in range(240)
]
ALL_ROWS = [json.dumps({"messages": messages}) + "\n" for messages in CHATS]
ROWS = "".join(ALL_ROWS[:12])
LASTING_ROWS = "".join(ALL_ROWS)
"""So many that none is held out, by which training might end early, and that 1,000 epochs, the most there are, last."""
LONG = 4000
"""Tokens of a text that is still written when the page looks."""
SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    tasks = {"pubs": "e2e", "other-pubs": "e2e", "facts": "webnlg"}
    prefixes = {name: {"task": task, "text_format": FORMAT} for name, task in tasks.items()}
    rules = "max_steps = 100_000"
    keys = {"me": rules, "acme": f'{rules}\nprefixes = ["acme-*"]'}
    fill_folder(folder, prefixes, f"max_tokens = {LONG}", keys, positions=4096)
    server = serve(folder, "--data-folder", str(folder / "data"))
    yield server
    server.stop()


READY = {
    "/": "document.querySelectorAll('#models input').length > 3 && document.querySelector('#inputs textarea') !== null",
    "/train": "document.getElementById('server')?.textContent.startsWith('training on')",
    "/docs": "document.querySelectorAll('.opblock').length > 20",
}
"""What is true once a page has its contents."""


def open_page(browser, server, path, key="pt-me", **options):
    """A page with a key, its contents shown."""
    browser.open(f"{server.url}/healthz")
    browser.value(f"sessionStorage.setItem('key', '{key}')")
    browser.open(f"{server.url}{path}", **options)
    browser.until(READY[path])
    return browser


@pytest.fixture
def playground(browser, server):
    return open_page(browser, server, "/")


@pytest.fixture
def train(browser, server):
    page = open_page(browser, server, "/train")
    page.value("window.confirm = () => true")
    return page


def text(page, element):
    return str(page.value(f"document.getElementById('{element}').textContent"))


def says(page, element, words):
    """Wait until an element says something."""
    page.until(f"document.getElementById('{element}').textContent.includes({json.dumps(words)})", SECONDS)


def click(page, element, words=""):
    """Click on an element, or on the button in it that says something, as soon as it is there and can be used."""
    found = f"document.getElementById('{element}')"
    if words:
        buttons = f"[...{found}.querySelectorAll('button')]"
        found = f"{buttons}.find((one) => one.textContent.startsWith('{words}'))"
    page.until(f"((one) => Boolean(one && !one.disabled && (one.click(), true)))({found})", SECONDS)


def fill(page, **values):
    for name, value in values.items():
        page.value(f"document.getElementById('{name.replace('_', '-')}').value = {json.dumps(value)}")


# --- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READY)
def test_a_key_is_asked_for(browser, server, path):
    browser.open(f"{server.url}/healthz")
    browser.value("sessionStorage.clear()")
    browser.open(f"{server.url}{path}")
    where = "#interface" if path == "/docs" else "#server.error"
    browser.until(f"/API key|Failed to load/.test((document.querySelector('{where}') || {{}}).textContent)")
    fill(browser, key="pt-me")
    browser.events.clear()
    click(browser, "key-form", "Use")
    browser.until(READY[path])
    assert browser.complaints() == []
    assert {url for url in browser.requests() if not url.startswith(("data:", f"{server.url}/"))} == set()
    assert browser.value("sessionStorage.getItem('key')") == "pt-me"
    assert browser.value("localStorage.length + document.cookie.length") == 0
    assert "default-src 'none'" in server.get(path)[2]["content-security-policy"]


@pytest.mark.parametrize(("path", "scheme"), [("/", "dark"), ("/train", "light")])
def test_fits_and_is_legible_and_labelled(browser, server, path, scheme):
    page = open_page(browser, server, path, scheme=scheme, width=360)
    if path == "/train":
        give(page, f"{'long' * 30}.md", f"{'word' * 50} " * 20)
        page.until("!document.getElementById('start').disabled", SECONDS)
        page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.value("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [360, 360]
    style = "getComputedStyle(document.documentElement)"
    names = ("page", "sheet", "text", "quiet", "bad", "good", "accent", "edge", "on-accent", "marked", "c1")
    color = {name: page.value(f"{style}.getPropertyValue('--{name}').trim()") for name in names}
    for name in ("text", "quiet", "bad", "good", "accent"):
        assert min(contrast(color[name], color[ground]) for ground in ("page", "sheet")) >= 4.5, name
    assert min(contrast(color[name], color["sheet"]) for name in ("edge", "c1")) >= 3
    assert min(contrast(color["text"], color["marked"]), contrast(color["on-accent"], color["accent"])) >= 4.5
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    labels = {(node.get("role", {}).get("value"), node.get("name", {}).get("value", "").strip()) for node in nodes}
    assert {"main", "banner", "heading", "navigation", "textbox", "status", "region"} <= {role for role, _ in labels}
    for role in ("button", "textbox", "searchbox", "checkbox", "radio", "combobox", "spinbutton", "region", "link"):
        assert (role, "") not in labels, role


# --- the playground ---------------------------------------------------------------------------------------------------


def choose(page, *names):
    """Have exactly these models chosen."""
    page.value("document.querySelectorAll('#models input:checked').forEach((box) => box.click())")
    for name in names:
        page.value(f"document.querySelector('#models input[value={name}]').click()")
    page.until(f"document.getElementById('count').textContent.startsWith('{len(names)} of')")


def write(page):
    """The text of each output."""
    click(page, "run")
    page.until("/Done|failed/.test(document.getElementById('said').textContent)")
    return page.value(
        "Object.fromEntries([...document.querySelectorAll('.output')].map((each) => "
        "[each.querySelector('h3').textContent, each.querySelector('.text').textContent]))"
    )


def field_is(page, words):
    page.until(f"document.getElementById('inputs').textContent.startsWith('{words}')")


def test_outputs_are_side_by_side_and_the_servers(playground, server):
    choose(playground, "pubs", "other-pubs", MODEL)
    field_is(playground, "mr")
    playground.value("document.getElementById('max_tokens').value = '30'")
    shown = write(playground)
    for name, output in shown.items():
        body = {"mr": MR, "max_tokens": 30, **({"format_of": "pubs"} if name == MODEL else {})}
        assert output == server.post(f"/v1/tasks/{name}", body, key="pt-me")[1]["output"]
    assert len(set(shown.values())) == 3
    tops = playground.value("[...document.querySelectorAll('.output')].map((each) => each.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    # All prefixes joined, in the order of choice.
    click(playground, "join")
    says(playground, "count", "joined: pubs + other-pubs")
    field_is(playground, "mr")
    joined = server.post("/v1/tasks/pubs+other-pubs", {"mr": MR, "max_tokens": 30}, key="pt-me")[1]["output"]
    assert write(playground)["pubs+other-pubs"] == joined
    assert playground.complaints() == []


def test_fields_of_a_task_and_an_error_in_place_of_an_output(playground, server):
    choose(playground, "facts", "pubs")
    field_is(playground, "triples")
    playground.value("document.getElementById('max_tokens').value = '20'")
    shown = write(playground)
    triples = [["Aarhus", "country", "Denmark"], ["Aarhus", "leaderName", "Jacob_Bundsgaard"]]
    body = {"triples": triples, "max_tokens": 20}
    assert shown["facts"] == server.post("/v1/tasks/facts", body, key="pt-me")[1]["output"]
    assert "triples" in shown["pubs"]
    assert text(playground, "said") == "1 of 2 failed."


def test_the_batch_is_seen_while_it_runs_and_can_be_stopped(playground, server):
    choose(playground, "pubs", "facts")
    playground.value("document.querySelector('[name=mode][value=prompt]').click()")
    field_is(playground, "Prompt")
    playground.value("document.querySelector('#inputs textarea').value = 'x'")
    playground.value(f"document.getElementById('max_tokens').value = '{LONG}'")
    click(playground, "run")
    playground.until("document.querySelectorAll('#slots .busy').length === 2")
    playground.until("document.querySelector('.output[aria-busy=true] .text').textContent.length > 5")
    click(playground, "halt")
    playground.until("[...document.querySelectorAll('.output .quiet')].every((one) => one.textContent === 'stopped')")
    playground.until("document.querySelectorAll('#slots .busy').length === 0")
    assert server.get("/v1/status", key="pt-me")[1]["running"] == []


def test_generated_text_is_never_executed(playground):
    # And the connection is lost after it.
    stream = f"data: {json.dumps({'delta': ATTACK})}\n\n"
    playground.value(f"window.fetch = async () => new Response({json.dumps(stream)})")
    shown = next(iter(write(playground).values()))
    assert shown.startswith(ATTACK)
    assert "connection was lost" in shown
    assert playground.value("window.attacked") is None
    assert playground.value("document.querySelectorAll('.output img').length") == 0


# --- training ---------------------------------------------------------------------------------------------------------


def give(page, name, content, field="file"):
    """Choose a file, as its field's dialog does."""
    page.value(
        "{ const files = new DataTransfer(); "
        f"files.items.add(new File([{json.dumps(content)}], {json.dumps(name)})); "
        f"const field = document.getElementById('{field}'); field.files = files.files; "
        "field.dispatchEvent(new Event('change')); }"
    )


def begin(page, **settings):
    """Start a job on the file that was chosen."""
    page.until("!document.getElementById('start').disabled", SECONDS)
    fill(page, **{"prefix_length": "4", **settings})
    click(page, "start")
    says(page, "job-title", settings["name"])


def test_from_a_file_to_an_answer(train, server):
    give(train, f"{ATTACK}.jsonl", ROWS)
    train.until("!document.getElementById('start').disabled", SECONDS)
    assert "12" in text(train, "facts")
    assert train.value("document.querySelector('#sample mark').textContent") == "at 0 o'clock"
    begin(train, name="clerk", epochs="4")
    # The new job has the focus, and is named by its title.
    assert train.value("document.activeElement.id") == "job"
    says(train, "job-said", "clerk answers now.")
    # A reload shows the same.
    train.open(f"{server.url}/train")
    train.until("document.querySelectorAll('#pairs dd.new').length === 3", SECONDS)
    fill(train, own="train 99")
    click(train, "compare", "Ask")
    train.until("document.querySelectorAll('#pairs dd.new').length === 4", SECONDS)
    answers = train.value("[...document.querySelectorAll('#pairs dd')].map((cell) => cell.textContent)")
    asked = {"messages": CHATS[0][:1], "max_tokens": 120, "temperature": 0}
    for answer, model in zip(answers, (MODEL, "clerk"), strict=False):
        body = server.post("/v1/chat/completions", {"model": model, **asked}, key="pt-me")[1]
        assert answer == body["choices"][0]["message"]["content"].strip()
    assert len(train.value("document.querySelector('#curve .train').getAttribute('points')").split()) > 2
    assert text(train, "curve-text").startswith("Loss ")
    # What names and texts contain is shown, and never executed.
    assert ATTACK in text(train, "files")
    assert ATTACK in text(train, "pairs")
    assert train.value("window.attacked") is None
    assert train.value("document.querySelectorAll('main img').length") == 0
    assert train.complaints() == []


def test_a_result_is_tried_downloaded_and_deleted(train, server):
    train.until("document.querySelector('#actions a') !== null", SECONDS)
    link = train.value("document.querySelector('#actions a').href")
    train.value("URL.createObjectURL = (blob) => { window.size = blob.size; return '#'; }")
    click(train, "actions", "Download")
    train.until("window.size > 0")
    size = server.request("HEAD", "/v1/models/clerk/file", key="pt-me")[2]["content-length"]
    assert train.value("window.size") == int(size)
    train.open(link)
    train.until("document.querySelectorAll('#models input:checked').length === 2")
    assert train.value("document.querySelector('[name=mode]:checked').value") == "chat"
    # Another key sees nothing of it, and trains the backbone, which its models do not name. A job that is gone is left.
    train.open(f"{server.url}/healthz")
    train.value("sessionStorage.setItem('key', 'pt-acme')")
    train.open(f"{server.url}/train#ftjob-0123456789abcdef01234567")
    says(train, "list-said", "No jobs yet.")
    assert train.value("location.hash") == ""
    assert train.value("[...document.querySelectorAll('#base option')].map((one) => one.value)") == [MODEL]
    open_page(train, server, "/train")
    train.until("document.querySelector('#actions a') !== null", SECONDS)
    train.value("window.confirm = () => false")
    click(train, "actions", "Delete")
    assert server.get("/v1/models/clerk", key="pt-me")[0] == 200
    train.value("window.confirm = () => true")
    click(train, "actions", "Delete")
    says(train, "job-said", "clerk was deleted.")
    assert train.value("document.getElementById('compare').hidden")
    assert server.get("/v1/models/clerk", key="pt-me")[0] == 404


def test_a_job_is_paused_resumed_and_cancelled(train):
    give(train, "lasting.jsonl", LASTING_ROWS)
    begin(train, name="long", epochs="1000")
    says(train, "bar-text", "Step")
    click(train, "actions", "Pause")
    says(train, "job-said", "Paused")
    click(train, "actions", "Resume")
    train.until("/waits|trains/.test(document.getElementById('job-said').textContent)", SECONDS)
    click(train, "actions", "Cancel")
    says(train, "job-said", "Cancelled.")
    assert train.value("document.querySelector('#jobs [aria-current=true]').textContent").startswith("longcancelled")


def test_a_lost_connection_recovers(train):
    train.value("window.real = window.fetch; window.fetch = async () => { throw new TypeError('gone'); }")
    train.value("document.dispatchEvent(new Event('visibilitychange'))")
    says(train, "server", "does not respond")
    train.value("window.fetch = window.real")
    says(train, "server", f"on {MODEL}")


def test_what_is_refused_is_explained(train):
    give(train, "chats.jsonl", ROWS + '{"messages": "nothing"}\n')
    says(train, "file-said", "line 13")
    assert train.value("document.getElementById('file-said').className") == "error"
    assert train.value("document.getElementById('start').disabled")
    give(train, "chats.jsonl", ROWS)
    train.until("!document.getElementById('start').disabled", SECONDS)
    fill(train, name=MODEL)
    click(train, "start")
    train.until("document.getElementById('start-said').className === 'error'")
    assert MODEL in text(train, "start-said")
    give(train, "wrong.jsonl", "{", "validation-file")
    click(train, "start")
    says(train, "start-said", "line 1")
    # In closed details nothing of a wrong value would be seen.
    fill(train, prefix_length="0")
    click(train, "start")
    train.until("document.getElementById('settings').open && document.activeElement.id === 'prefix-length'")


def test_pasted_examples_a_document_and_its_questions_are_asked_for(train, server):
    train.value(
        "window.real = window.fetch; window.fetch = async (path, options = {}) => { "
        "if (path === '/v1/fine_tuning/jobs' && options.method === 'POST') { window.asked = options.body; "
        """return new Response('{"error": {"message": "seen"}}', { status: 400 }); } """
        "return window.real(path, options); }"
    )
    fill(train, pasted="Who?\tMe\nWhere? => Here\nno answer\n")
    click(train, "paste")
    fill(train, seed="3")
    click(train, "start")
    says(train, "start-said", "seen")
    body = json.loads(train.value("window.asked"))
    rows = server.get(f"/v1/files/{body['training_file']}/content", key="pt-me")[1]
    assert [json.loads(row) for row in rows.splitlines()] == [
        {"prompt": "Who?", "completion": "Me"}, {"prompt": "Where?", "completion": "Here"}
    ]  # fmt: skip
    assert body == {"model": MODEL, "training_file": body["training_file"], "seed": 3, "prefixtune": {"name": "pasted"}}
    give(train, "tower.txt", "The tower was built in 1887. It is 300 metres high.")
    says(train, "file-said", "tower.txt")
    give(train, "questions.csv", "question,answer\nHow high is it?,300 metres\n", "questions-file")
    click(train, "start")
    train.until("JSON.parse(window.asked).prefixtune.questions !== undefined", SECONDS)
    questions = json.loads(train.value("window.asked"))["prefixtune"]["questions"]
    assert server.get(f"/v1/files/{questions}", key="pt-me")[1]["filename"] == "questions.csv"


def test_the_keyboard_is_enough(train):
    give(train, "lasting.jsonl", LASTING_ROWS)
    train.until("!document.getElementById('start').disabled", SECONDS)
    train.value("document.getElementById('key').focus()")
    reached = []
    while len(reached) < 30 and "start" not in reached:
        train.press("Tab", 9)
        reached.append(train.value("document.activeElement.id || document.activeElement.parentElement.id"))
    wanted = ["file", "sample", "name", "settings", "start"]
    assert [name for name in reached if name in wanted] == wanted
    fill(train, name="by-keyboard", epochs="1000")
    train.press("Enter", 13)
    says(train, "job-title", "by-keyboard")
    click(train, "actions", "Cancel")
    says(train, "job-said", "Cancelled.")
