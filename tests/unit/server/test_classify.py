"""`/classify`: the labels of `classify` and `tag`, in vLLM's shape, while texts are generated."""

import asyncio
import itertools
import threading

import pytest
import torch

from asgi_client import send
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.inference.classify import EncodedTexts, classify, tag
from prefixtune.prefix.prefix import Head, Prefix, save_prefix

TEXTS = ["a b c", "soup", "Aromi is a pub by the river", "x y", "z"]


@pytest.fixture
def server(make_server, backbone, random_prefix):
    app, state = make_server(prefill_tokens=16)
    width = backbone.model.config.hidden_size
    labels = {
        "head": {"kind": "classification", "by": "head", "names": ["bad", "good", "none"]},
        "words": {"kind": "classification", "by": "words", "names": ["no", "yes"], "words": ["no", "yes"]},
        "tags": {"kind": "tagging", "by": "head", "names": ["B", "I"]},
    }
    for seed, (name, facts) in enumerate(labels.items()):
        generator = torch.Generator().manual_seed(seed)
        count = len(facts["names"])
        head = None
        if facts["by"] == "head":
            head = Head(torch.randn(count, width, generator=generator), torch.randn(count, generator=generator))
        header = make_header(backbone, task=facts["kind"], labels=facts)
        prefix = Prefix(random_prefix(backbone, 3, seed).layers, header, head)
        save_prefix(state.store.folder / f"{name}.safetensors", prefix)
    return app, state


def loaded(server, backbone, name):
    return load_prefix(server[1].store.folder / f"{name}.safetensors", backbone)


def test_the_labels_are_classifys(server, backbone):
    for name in ("head", "words"):
        response = asyncio.run(send(server[0], "POST", "/classify", {"model": name, "input": TEXTS})).json
        expected = classify(backbone, TEXTS, loaded(server, backbone, name))
        assert (response["object"], response["model"]) == ("list", name)
        assert response["usage"]["prompt_tokens"] == response["usage"]["total_tokens"] > 0
        for index, (item, prediction) in enumerate(zip(response["data"], expected, strict=True)):
            assert (item["index"], item["label"]) == (index, prediction.label)
            assert item["probs"] == pytest.approx(list(prediction.probabilities.values()), abs=1e-5)
            assert item["num_classes"] == len(item["probs"])


def test_tags_are_those_of_tag(server, backbone):
    texts = [text.split() for text in TEXTS]
    expected = tag(backbone, texts, loaded(server, backbone, "tags"))
    for sent in (TEXTS, texts):
        response = asyncio.run(send(server[0], "POST", "/classify", {"model": "tags", "input": sent})).json
        for item, words, predictions in zip(response["data"], texts, expected, strict=True):
            assert (item["label"], item["probs"], item["num_classes"]) == (None, None, 2)
            assert [token["token"] for token in item["tokens"]] == words
            assert [token["label"] for token in item["tokens"]] == [one.label for one in predictions]


def test_a_prefix_with_labels_writes_no_text(server):
    for path, more in (("/v1/completions", {"prompt": "x"}), ("/v1/tasks/head", {"source": "x"})):
        body = {**({"model": "head"} if path.startswith("/v1/comp") else {}), **more}
        response = asyncio.run(send(server[0], "POST", path, body))
        assert (response.status, response.code) == (400, "not_a_generator")


def test_scores_that_are_not_finite_are_an_error_of_the_engine(server, monkeypatch):
    score = EncodedTexts.score
    monkeypatch.setattr(EncodedTexts, "score", lambda *arguments: [one * torch.nan for one in score(*arguments)])
    response = asyncio.run(send(server[0], "POST", "/classify", {"model": "head", "input": TEXTS}))
    assert (response.status, response.code) == (500, "engine_error")
    assert b"finite" not in response.body


def test_texts_are_generated_meanwhile(server):
    """A batch is labelled between two steps: nobody waits for all of them."""
    app, state = server
    order = []
    engine = state.worker
    step, call = engine.step, state.worker.call

    def stepped():
        order.append("step")
        return step()

    def called(work):
        def noted(backbone):
            order.append("batch")
            return work(backbone)

        return call(noted)

    engine.step, state.worker.call = stepped, called
    text = {"model": "a", "prompt": "hi", "max_tokens": 150, "temperature": 0}

    async def both():
        writing = asyncio.ensure_future(send(app, "POST", "/v1/completions", text))
        while len(order) < 3:
            await asyncio.sleep(0.001)
        return await asyncio.gather(writing, send(app, "POST", "/classify", {"model": "head", "input": TEXTS * 2}))

    written, labelled = asyncio.run(both())
    assert (written.status, labelled.status) == (200, 200)
    batches = [index for index, what in enumerate(order) if what == "batch"]
    assert len(batches) > 5
    between = [later - earlier for earlier, later in itertools.pairwise(batches)]
    assert min(between) > 1


def test_many_labels_are_scored_in_parts(server, backbone):
    """However many there are, no step of the others waits for more than a part of them."""
    app, state = server
    labels = [f"label {number}" for number in range(40)]
    sizes = []
    call = state.worker.call

    def called(work):
        part = work.keywords["part"]
        sizes.append(sum(len(f" {label} ") for label in labels[part]) * len(work.keywords["rows"]))
        return call(work)

    state.worker.call = called
    response = asyncio.run(send(app, "POST", "/classify", {"model": "tiny", "input": TEXTS[:2], "labels": labels})).json
    expected = classify(backbone, TEXTS[:2], labels=labels)
    for item, prediction in zip(response["data"], expected, strict=True):
        assert (item["label"], item["num_classes"]) == (prediction.label, 40)
        assert item["probs"] == pytest.approx(list(prediction.probabilities.values()), abs=1e-5)
    assert len(sizes) > 20
    assert max(sizes) <= max(16, max(len(f" {text} ") for text in TEXTS[:2])) + 10


def test_a_forced_stop_answers_what_waits(server, monkeypatch):
    app, state = server
    monkeypatch.setattr("prefixtune.engine.base.CLOSE_SECONDS", 0.0)
    begun, release = threading.Event(), threading.Event()

    def busy(_):
        begun.set()
        assert release.wait(20)

    async def stop():
        state.worker.call(busy)
        assert await asyncio.to_thread(begun.wait, 20)
        waiting = [
            asyncio.ensure_future(send(app, "POST", "/classify", {"model": "head", "input": "x"})) for _ in range(2)
        ]
        while not state.worker._calls:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(state.worker.close)
        release.set()
        return list(await asyncio.gather(*waiting))

    for response in asyncio.run(stop()):
        assert (response.status, response.code) == (503, "engine_unavailable")
        assert "retry-after" in response.headers
