"""What jobs made is served to its owner and admins alone: by OpenAI's client, listed, used, deleted, and found new."""

import asyncio
import os
import shutil
from pathlib import Path

import openai
import pytest

import openai_client
from asgi_client import bearer, keys, send
from prefixtune.prefix.prefix import read_artifact

# Ann's patterns allow no result, which she may use all the same.
KEYS = keys(ann={"prefixes": ("tiny", "a")}, bob={}, boss={"admin": True, "prefixes": ("tiny",)})


@pytest.fixture
def publish(tmp_path, backbone, save_random_prefix):
    """`publish(name, owner, step, seed)` puts a file into the folder as a job does; no owner: as anybody else does."""
    folder = tmp_path / "prefixes"

    def put(name, owner="ann", step=None, seed=3, job_id=""):
        job = {"id": job_id or f"ftjob-{owner}", "owner": owner, **({} if step is None else {"step": step})}
        facts = {"job": job} if owner else {}
        made = save_random_prefix(tmp_path / "made.safetensors", backbone, seed=seed, **facts)
        return Path(shutil.move(made, folder / f"{name}.safetensors"))

    return put


def ask(app, key, question):
    """The answer to one question of the client with somebody's key."""
    return openai_client.ask(app, question, f"pt-{key}")


def text(model):
    return lambda client: client.completions.create(model=model, prompt="hello", max_tokens=3)


def listed(app, key):
    async def names(client):
        return [model.id async for model in client.models.list()]

    return list(ask(app, key, names))


def test_owners_and_admins_see_and_use_a_result(make_server, publish):
    app, _ = make_server(keys=KEYS)
    path = publish("hers")
    publish("hers.step-4", step=4)
    assert listed(app, "ann") == ["tiny", "a", "hers"]
    assert listed(app, "bob") == ["tiny", "a", "b"]
    # An admin's patterns hide no result either.
    assert listed(app, "boss") == ["tiny", "hers"]
    for key in ("ann", "boss"):
        model = ask(app, key, lambda client: client.models.retrieve("hers"))
        assert (model.id, model.owned_by, model.job) == ("hers", "ann", "ftjob-ann")
        assert model.created == int(path.stat().st_mtime)
        for name in ("hers", "hers.step-4"):
            assert ask(app, key, text(name)).model == name
    assert ask(app, "ann", text("a+hers")).model == "a+hers"


def test_for_others_there_is_no_such_model(make_server, publish):
    """Neither status nor words show that the name is taken; whether it is served, or its file is broken."""
    app, state = make_server(keys=KEYS)
    publish("a-result-1")
    publish("a-result-2", step=2)
    broken = publish("a-result-3")
    publish("a-result-5", owner="bob")
    assert "a-result-3" in state.store.names()
    broken.write_bytes(broken.read_bytes()[:-4])
    assert list(state.store.refused) == ["a-result-3"]

    def answers(name, key):
        paths = (f"/v1/models/{name}", f"/v1/tasks/{name}", f"/v1/models/{name}/file")
        found = [asyncio.run(send(app, "GET", path, headers=bearer(key))) for path in paths]
        return [(one.status, one.body.decode().replace(name, "NAME")) for one in found]

    unknown = answers("a-result-0", "bob")
    assert [status for status, _ in unknown] == [404] * 3
    assert [answers(f"a-result-{number}", "bob") for number in (1, 2, 3)] == [unknown] * 3
    # A key with patterns gets what it gets for any name outside of them.
    assert answers("a-result-5", "ann") == answers("b", "ann") == answers("nothing", "ann")
    assert answers("a-result-5", "ann")[0][0] == 403


def test_a_file_that_became_somebody_elses_is_not_used_by_what_was_known_of_it(make_server, publish):
    app, _ = make_server(keys=KEYS)
    publish("shared", owner="")
    assert ask(app, "bob", text("shared")).model == "shared"
    # Another machine's job took the name; this server has not looked at the folder since.
    publish("shared", owner="ann", seed=4)
    with pytest.raises(openai.NotFoundError):
        ask(app, "bob", text("shared"))
    assert ask(app, "ann", text("shared")).model == "shared"


def test_an_upload_over_a_result_is_no_result_any_more(make_server, publish, tmp_path):
    app, _ = make_server(keys=KEYS)
    mine, checkpoint, other = publish("hers"), publish("hers.step-4", step=4), publish("hers.step-6", "bob", step=6)
    for body, left in ((mine, True), (tmp_path / "prefixes" / "a.safetensors", False)):
        sent = send(app, "PUT", "/v1/models/hers", body.read_bytes(), headers=bearer("boss"))
        assert asyncio.run(sent).status == 200
        assert (checkpoint.exists(), other.exists()) == (left, True)
    assert "hers" in listed(app, "bob")
    with pytest.raises(openai.PermissionDeniedError):
        ask(app, "ann", text("hers"))


@pytest.mark.parametrize("claims", [{"owner": "bob"}, {"job_id": "ftjob-other"}, {"step": 4}])
def test_an_uploaded_file_does_not_say_whose_it_is(make_server, publish, claims):
    """Whoever wrote the file of a third party could give it to any key, to be downloaded and deleted."""
    app, _ = make_server(keys=KEYS)
    body = publish("foreign", **claims)
    content = body.read_bytes()
    prefix = read_artifact(body)
    body.unlink()
    publish("hers")
    for name in ("new", "hers"):
        sent = asyncio.run(send(app, "PUT", f"/v1/models/{name}", content, headers=bearer("boss")))
        assert sent.status in (200, 201)
        stored = read_artifact(body.with_name(f"{name}.safetensors"))
        assert stored.header == {key: value for key, value in prefix.header.items() if key != "job"}
        assert stored.equal(prefix)
        with pytest.raises(openai.PermissionDeniedError):
            ask(app, "bob", lambda client, name=name: client.models.delete(name))


@pytest.mark.parametrize("key", ["ann", "boss"])
def test_a_result_is_deleted_with_its_checkpoints(make_server, publish, key):
    app, _ = make_server(keys=KEYS)
    job_id = f"ftjob-{'1' * 24}"
    names = (("hers", None), ("hers.step-2", 2), ("hers.step-4", 4))
    gone = [publish(name, step=step, job_id=job_id) for name, step in names]
    stays = [publish("hers.step-6", owner="bob", step=6), publish("hers.step-8", owner=""), publish("hers2")]
    # A checkpoint may go alone.
    assert ask(app, key, lambda client: client.models.delete("hers.step-2")).deleted
    assert [path.exists() for path in gone] == [True, False, True]
    deleted = ask(app, key, lambda client: client.models.delete("hers"))
    assert (deleted.id, deleted.object, deleted.deleted) == ("hers", "model", True)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stays)
    with pytest.raises((openai.NotFoundError, openai.PermissionDeniedError)):
        ask(app, key, text("hers.step-4"))


def test_what_no_job_made_is_deleted_by_admins_only(make_server, tmp_path):
    app, _ = make_server(keys=KEYS | keys(root={"admin": True, "prefixes": ("none",)}))
    for key, name in (("bob", "a"), ("bob", "tiny"), ("root", "tiny")):
        with pytest.raises(openai.PermissionDeniedError):
            ask(app, key, lambda client, name=name: client.models.delete(name))
    with pytest.raises(openai.NotFoundError):
        ask(app, "bob", lambda client: client.models.delete("a+b"))
    assert ask(app, "root", lambda client: client.models.delete("a")).deleted
    assert os.listdir(tmp_path / "prefixes") == ["b.safetensors"]


def test_a_result_that_is_not_served_can_be_deleted(make_server, publish):
    app, state = make_server(keys=KEYS)
    path = publish("hers")
    # Its header can be read, but it is for another model.
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"num_layers', b'"xum_layers').replace(b"decoder.0.key", b"decoder.9.key"))
    assert "hers" in state.store.refused
    with pytest.raises(openai.NotFoundError):
        ask(app, "bob", text("hers"))
    with pytest.raises(openai.APIStatusError, match="not served") as refused:
        ask(app, "ann", text("hers"))
    assert refused.value.status_code == 503
    assert ask(app, "ann", lambda client: client.models.delete("hers")).deleted
    assert not path.exists()
