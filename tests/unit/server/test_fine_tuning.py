"""`/v1/fine_tuning/jobs` by OpenAI's client: create, look, stop; and everything that is refused, with nothing left."""

import asyncio
import io
import json
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial

import openai
import pytest

from asgi_client import send
from openai_client import ask
from prefixtune.backbone.prefixes import make_header
from prefixtune.jobs.job import Job
from prefixtune.jobs.queue import JobQueue, QueueUnavailableError
from prefixtune.jobs.worker import launch
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix
from prefixtune.server.api import job_creation
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig
from prefixtune.training.config import TrainConfig

ROWS = "".join(json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) + "\n" for n in range(20))


async def act(job_id, action, client):
    """Cancel, pause or resume a job."""
    return await getattr(client.fine_tuning.jobs, action)(job_id)


def upload(state, text=ROWS, name="rows.jsonl", purpose="fine-tune", owner="local"):
    return str(state.training.files.put(owner, io.BytesIO(text.encode()), name, purpose).id)


def create(app, file, *, key="none", model="tiny", **more):
    own = {"extra_body": {"prefixtune": more.pop("own")}} if "own" in more else {}
    return ask(app, lambda client: client.fine_tuning.jobs.create(model=model, training_file=file, **own, **more), key)


def refusal(app, file, **more):
    with pytest.raises(openai.APIStatusError) as caught:
        create(app, file, **more)
    return caught.value


def left(state):
    """The folders and the queued jobs that there are."""
    folder = state.training.folder.jobs
    folders = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = asyncio.run(state.training.ask(lambda queue: [state.job.id for state in queue.unfinished()]))
    return folders, sorted(found)


@contextmanager
def worker(state, run):
    """A worker that runs jobs in its own way."""
    training = state.training
    with launch(training.database_url, "tests", training.backbone, lambda job, _: run(job)):
        yield


def wait_for(app, job_id, *statuses):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        job = ask(app, lambda client: client.fine_tuning.jobs.retrieve(job_id))
        if job.status in statuses:
            return job
        time.sleep(0.05)
    raise AssertionError(f"{job_id} is {job.status}")


def keys(**rules):
    return {name: KeyConfig(hash=hash_key(f"pt-{name}"), **more) for name, more in rules.items()}


# --- what works -------------------------------------------------------------------------------------------------------


def test_a_job_from_its_creation_to_its_result(make_server):
    app, state = make_server(trackers=("wandb",))
    file, check = upload(state), upload(state)
    woken = threading.Event()
    state.training.wake = woken.set
    job = create(
        app,
        file,
        validation_file=check,
        suffix="cats",
        seed=7,
        metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        integrations=[{"type": "wandb", "wandb": {"project": "pets", "name": "first"}}],
        own={"prefix_length": 4, "start": "words"},
    )
    assert woken.is_set()
    assert (job.status, job.model, job.training_file, job.validation_file) == ("queued", "tiny", file, check)
    assert (job.seed, job.metadata, job.organization_id) == (7, {"team": "blue"}, "local")
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 16)
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 1.0
    assert job.integrations[0].wandb.project == "pets"
    assert job.prefixtune["name"] == f"cats-{job.id[-8:]}"
    assert job.prefixtune["position"] == 0
    folder = state.training.folder.job(job.id)
    train = folder.find_input("train")
    assert train is not None
    assert (train.name, train.read_text()) == ("train.jsonl", ROWS)
    assert folder.find_input("dev") is not None
    # The upload may go: the job has its own link.
    state.training.files.delete(state.training.files.get("local", file))

    began, release = threading.Event(), threading.Event()
    seen = []
    now = int(time.time())

    def run(asked):
        seen.append(asked)
        events = state.training.folder.job(asked.id)
        events.add_event("step 1", data={"step": 1, "total_steps": 6, "train_loss": 2.0, "seconds_left": 30.0})
        began.set()
        assert release.wait(20)
        events.add_event("step 6", data={"step": 6, "total_steps": 6, "train_loss": 1.0, "trained_tokens": 99})
        events.add_event("done", data={"step": 6, "total_steps": 6, "valid_loss": 1.6, "best_loss": 1.5})

    with worker(state, run):
        assert began.wait(20)
        running = ask(app, lambda client: client.fine_tuning.jobs.retrieve(job.id))
        assert running.status == "running"
        assert 0 <= running.estimated_finish - now - 30 < 20
        assert running.prefixtune["progress"]["step"] == 1
        assert (running.fine_tuned_model, running.trained_tokens, running.result_files) == (None, None, [])
        # Of a worker that has not been heard of since.
        log = folder.root / "events.jsonl"
        event = folder.events()[0]
        log.write_text(event.model_copy(update={"created": now - 100}).model_dump_json() + "\n")
        assert ask(app, lambda client: client.fine_tuning.jobs.retrieve(job.id)).estimated_finish is None
        (asked,) = seen
        assert (asked.backbone, asked.fingerprint) == (state.training.backbone, state.backbone.fingerprint)
        release.set()
        done = wait_for(app, job.id, "succeeded")
    assert (done.fine_tuned_model, done.trained_tokens) == (job.prefixtune["name"], 99)
    assert (done.result_files, done.prefixtune["best_loss"]) == ([job.id.replace("ftjob", "file")], 1.5)
    assert done.finished_at >= done.created_at
    config = seen[0].config
    assert (config["prefix_length"], config["initialization"], config["max_steps"]) == (4, "words", 6)
    assert (config["report_to"], config["run_name"]) == (["wandb"], "first")

    async def events(client):
        first = await client.fine_tuning.jobs.list_events(job.id, limit=1)
        return [one.message async for one in first], [one.data async for one in first]

    messages, data = ask(app, events)
    assert messages == ["done", "step 6", "step 1"]
    assert (data[2]["step"], data[2]["train_loss"]) == (1, 2.0)
    assert ask(app, lambda client: client.fine_tuning.jobs.checkpoints.list(job.id)).data == []


def test_checkpoints_are_listed_as_far_as_they_are_served(make_server, tmp_path, backbone, random_prefix):
    app, state = make_server()
    job = create(app, upload(state), own={"name": "cats"})
    copies = state.training.folder.job(job.id).checkpoints
    for step in (2, 4):
        header = {**make_header(backbone), "job": {"id": job.id, "owner": "local", "step": step}}
        save_prefix(copies / f"cats.step-{step}.safetensors", Prefix(random_prefix(backbone, 4, step).layers, header))

    def listed():
        found = ask(app, lambda client: client.fine_tuning.jobs.checkpoints.list(job.id))
        return [one.fine_tuned_model_checkpoint for one in found.data]

    assert listed() == ["cats.step-4", "cats.step-2"]
    # Another model has the name of the other one.
    shutil.copyfile(copies / "cats.step-2.safetensors", tmp_path / "prefixes" / "cats.step-2.safetensors")
    shutil.copyfile(tmp_path / "prefixes" / "a.safetensors", tmp_path / "prefixes" / "cats.step-4.safetensors")
    with worker(state, lambda job: None):
        wait_for(app, job.id, "succeeded")
    assert listed() == ["cats.step-2"]


@pytest.mark.parametrize("at_once", [1, 100])
def test_jobs_are_listed_in_pages_and_by_metadata(at_once, make_server, monkeypatch):
    monkeypatch.setattr("prefixtune.server.api.fine_tuning._AT_ONCE", at_once)
    app, state = make_server()
    file = upload(state)
    made = [create(app, file, metadata={"n": str(n), "all": "yes"}).id for n in range(3)]

    async def listed(client, **query):
        page = await client.fine_tuning.jobs.list(**query)
        return [job.id async for job in page]

    assert ask(app, lambda client: listed(client, limit=1)) == made[::-1]
    assert ask(app, lambda client: listed(client, limit=2, after=made[2])) == made[1::-1]
    assert ask(app, lambda client: listed(client, metadata={"n": "1", "all": "yes"})) == [made[1]]
    plain = create(app, file).id
    assert ask(app, lambda client: listed(client, extra_query={"metadata": "null"})) == [plain]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(app, lambda client: listed(client, after=f"ftjob-{'1' * 24}"))
    assert caught.value.param == "after"
    training = state.training
    other = JobQueue(training.database_url)
    other.add(Job(id=f"ftjob-{'0' * 24}", owner="x", created=1, model="m", name="o", backbone="other"))
    last = create(app, file)
    other.close()
    assert last.prefixtune["position"] == 4


def test_a_job_is_paused_resumed_and_cancelled(make_server):
    app, state = make_server()
    job = create(app, upload(state), own={"name": "mine"})
    assert ask(app, lambda client: client.fine_tuning.jobs.pause(job.id)).status == "paused"
    # A paused job keeps its name.
    assert refusal(app, upload(state), own={"name": "mine"}).code == "name_taken"
    assert ask(app, lambda client: client.fine_tuning.jobs.resume(job.id)).status == "queued"
    assert ask(app, lambda client: client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    for action in ("cancel", "pause", "resume"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(app, partial(act, job.id, action))
        assert caught.value.code == "job_ended"
    create(app, upload(state), own={"name": "mine"})


def test_training_goes_on_from_a_prefix(make_server):
    app, state = make_server()
    job = create(app, upload(state), model="a")
    folder = state.training.folder.job(job.id)
    start = folder.find_input("init_prefix")
    assert start is not None
    assert start.read_bytes() == (state.store.folder / "a.safetensors").read_bytes()
    asked = asyncio.run(state.training.ask(lambda queue: queue.get(job.id))).job
    assert (asked.config["initialization"], asked.config["prefix_length"]) == ("prefix", 4)


def test_training_goes_on_from_a_prefix_of_any_sites():
    asked = Job(id="ftjob-1", owner="ann", created=1, model="a")
    values = job_creation._given_values(asked, "prompt", {"encoder": 20, "cross": 5})
    config = TrainConfig(train="x", output="y", **values)
    assert (config.initialization, config.site_lengths) == ("prefix", {"encoder": 20, "cross": 5})


def test_a_run_is_called_as_its_job_where_no_name_is_given(make_server):
    app, state = make_server(trackers=("trackio",))
    job = create(app, upload(state), integrations=[{"type": "trackio"}])
    config = asyncio.run(state.training.ask(lambda queue: queue.get(job.id))).job.config
    assert (config["report_to"], config["project"], config["run_name"]) == (["trackio"], "", job.id)


def test_only_who_may_have_a_prefix_goes_on_from_it(make_server, monkeypatch):
    app, state = make_server(keys=keys(ann={}, bob={}, boss={"admin": True}))
    files = {name: upload(state, owner=name) for name in ("ann", "bob", "boss")}
    shared = refusal(app, files["ann"], model="a", key="pt-ann")
    assert (shared.status_code, shared.code) == (403, "not_the_owner")
    assert create(app, files["boss"], model="a", key="pt-boss").status == "queued"

    path = state.store.folder / "mine.safetensors"
    prefix = read_artifact(state.store.folder / "a.safetensors")

    def made_by(owner):
        header = {**prefix.header, "job": {"id": f"ftjob-{owner}", "owner": owner}}
        save_prefix(path, Prefix(prefix.layers, header))

    made_by("ann")
    assert create(app, files["ann"], model="mine", key="pt-ann").status == "queued"
    assert refusal(app, files["bob"], model="mine", key="pt-bob").status_code == 404

    # It becomes somebody else's after the look at its header.
    before = left(state)
    monkeypatch.setattr(job_creation, "_check_room", lambda *_: made_by("bob"))
    replaced = refusal(app, files["ann"], model="mine", key="pt-ann")
    assert (replaced.status_code, replaced.code) == (403, "not_the_owner")
    assert left(state) == before


def test_a_request_that_is_sent_again_gets_the_same_job(make_server):
    app, state = make_server()
    file = upload(state)
    header = {"extra_headers": {"Idempotency-Key": "once"}}
    first = create(app, file, own={"name": "mine"}, **header)
    again = create(app, file, own={"name": "mine"}, **header)
    assert first.id == again.id

    async def at_once(client):
        ask_for = partial(client.fine_tuning.jobs.create, model="tiny", extra_headers={"Idempotency-Key": "two"})
        return await asyncio.gather(*(ask_for(training_file=file) for _ in range(4)))

    assert len({job.id for job in ask(app, at_once)}) == 1
    assert len(left(state)[1]) == 2


def test_a_folder_that_another_server_has_made_for_the_same_request_is_kept(make_server, monkeypatch):
    def away(*_):
        raise QueueUnavailableError("the database of jobs cannot be reached.")

    app, state = make_server()
    file, header = upload(state), {"Idempotency-Key": "once"}
    with monkeypatch.context() as patched:
        patched.setattr(JobQueue, "add", away)
        assert refusal(app, file, extra_headers=header).status_code == 503
    (job_id,), _ = left(state)
    folder = state.training.folder.job(job_id)
    (folder.root / "mark").touch()
    assert create(app, file, extra_headers=header).id == job_id
    assert (folder.root / "mark").exists()
    assert folder.find_input("train") is not None


def test_many_requests_at_once_keep_the_limit_and_the_names(make_server):
    app, state = make_server()
    file = upload(state)

    async def create_many(client):
        def job(name):
            return client.fine_tuning.jobs.create(
                model="tiny", training_file=file, extra_body={"prefixtune": {"name": name}}
            )

        return await asyncio.gather(*(job(f"n{n % 12}") for n in range(14)), return_exceptions=True)

    results = ask(app, create_many)
    made = [one for one in results if not isinstance(one, Exception)]
    assert len(made) == 10
    assert len({one.prefixtune["name"] for one in made}) == 10
    codes = {one.code for one in results if isinstance(one, openai.APIStatusError)}
    assert codes <= {"too_many_jobs", "name_taken"}
    folders, queued = left(state)
    assert folders == queued


# --- what is refused --------------------------------------------------------------------------------------------------


def test_trackers_are_allowed_by_the_servers_owner(make_server):
    app, state = make_server(trackers="trackio,wandb")
    other = refusal(app, upload(state), integrations=[{"type": "mlflow"}])
    assert (other.status_code, other.param, other.code) == (400, "integrations[0].type", "tracker_not_allowed")
    assert left(state) == ([], [])


def test_what_is_wrong_with_a_request_is_named(make_server):
    app, state = make_server()
    rows = upload(state)
    label, two = (
        upload(state, text, "a.csv") for text in ("text,label\na,b\n", "prompt,completion,question,answer\n1,2,3,4\n")
    )
    broken, document = upload(state, '{"prompt": "no answer"}\n'), upload(state, "Owls fly.", "a.txt", "document")
    summaries, as_document = upload(state, '{"document": "a", "summary": "b"}\n'), {"own": {"form": "document"}}
    metrics = state.training.files.put_metrics("local", f"ftjob-{'0' * 24}", b"step\n").id
    open_questions = upload(state, "".join(json.dumps({"question": f"Why {n}?"}) + "\n" for n in range(1001)))
    twice = {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2}}}
    for file, more, param, code in (
        (broken, {}, "training_file", "invalid_training_file"),
        (metrics, {}, "training_file", "invalid_training_file"),
        (two, {}, "prefixtune.form", None),
        (rows, {"own": {"form": "label"}}, "training_file", "invalid_training_file"),
        *((file, {}, "training_file", "invalid_training_file") for file in (label, open_questions)),
        (rows, {"own": {"start": "examples", "init_examples": 64}}, "prefixtune.init_examples", None),
        *((file, as_document, "training_file", "invalid_training_file") for file in (rows, metrics)),
        (summaries, {"validation_file": label}, "validation_file", "invalid_validation_file"),
        (summaries, {"validation_file": document}, "validation_file", "invalid_validation_file"),
        (rows, {"validation_file": label}, "validation_file", "invalid_validation_file"),
        (rows, {"validation_file": f"file-{'1' * 24}"}, "validation_file", "file_not_found"),
        (document, {"own": {"questions": rows}}, "prefixtune.questions", "invalid_questions"),
        (document, {"own": {"questions": open_questions}}, "prefixtune.questions", None),
        (document, {"own": {"questions": two, "num_questions": 5}}, "prefixtune.num_questions", None),
        *((rows, {"own": {name: 9}}, f"prefixtune.{name}", None) for name in ("num_questions", "answer_length")),
        *((document, {"own": own}, f"prefixtune.{min(own)}", None) for own in ({"preset": "quick"}, {"form": "text"})),
        (rows, {"own": {"document": rows}}, "prefixtune.document", None),
        (rows, {"validation_file": rows, "own": {"hold_out": 0.5}}, "prefixtune.hold_out", None),
        (rows, {"hyperparameters": {"n_epochs": 3}, "method": twice}, "hyperparameters", None),
        (document, {"validation_file": upload(state, "Owls.", "b.txt", "document")}, "validation_file", None),
        (rows, {"own": {"init_text": "@/etc/passwd"}}, "prefixtune.init_text", None),
        (rows, {"own": {"prefix_length": 2048}}, "prefixtune.prefix_length", None),
        (rows, {"own": {"max_steps": 5}, "hyperparameters": {"n_epochs": 1}}, "prefixtune.max_steps", None),
        (rows, {"model": "a", "own": {"start": "words"}}, "prefixtune.start", None),
        (rows, {"suffix": "x" * 64, "own": {"name": "x.step-4"}}, "prefixtune.name", "invalid_name"),
        *((rows, {"own": {"name": name}}, "prefixtune.name", "invalid_name") for name in ("../x", "a+b", ".x", "x\n")),
        (rows, {"own": {"name": "x" * 113}}, "prefixtune.name", "invalid_name"),
    ):
        error = refusal(app, file, **more)
        assert (error.status_code, error.param, error.code) == (404 if code == "file_not_found" else 400, param, code)
    assert left(state) == ([], [])
    for name in ("x" * 112, "support.step-x", "support.step-3.b"):
        assert create(app, rows, own={"name": name}).prefixtune["name"] == name
    job = create(app, document, own={"questions": upload(state, '{"question": "Who?", "answer": "Owls."}\n')})
    assert (job.prefixtune["kind"], job.prefixtune["name"]) == ("document", f"ft-{job.id[-8:]}")
    assert state.training.folder.job(job.id).find_input("questions") is not None


def test_keys_see_their_own_and_admins_all(make_server):
    rules = keys(ann={"prefixes": ("acme-*",)}, bob={}, boss={"admin": True}, reader={"train": False})
    app, state = make_server(keys=rules)
    file = upload(state, owner="ann")
    job = create(app, file, key="pt-ann")
    listed = {
        name: [one.id for one in ask(app, lambda client: client.fine_tuning.jobs.list(), f"pt-{name}").data]
        for name in ("ann", "bob", "boss")
    }
    assert listed == {"ann": [job.id], "bob": [], "boss": [job.id]}
    # Her patterns leave the backbone out, which she trains all the same: the list says its name.
    assert ask(app, lambda client: client.models.list(), "pt-ann").data == []
    page = ask(app, lambda client: client.fine_tuning.jobs.list(), "pt-ann")
    assert page.prefixtune == {"backbone": job.model}
    assert ask(app, lambda client: client.fine_tuning.jobs.cancel(job.id), "pt-boss").status == "cancelled"


def test_limits_of_a_key(make_server):
    rules = keys(few={"max_jobs": 1}, none={"max_prefixes": 0}, short={"max_steps": 4})
    app, state = make_server(keys=rules)
    files = {name: upload(state, owner=name) for name in rules}
    create(app, files["few"], key="pt-few")
    many = refusal(app, files["few"], key="pt-few")
    assert (many.status_code, many.code) == (429, "too_many_jobs")
    assert many.response.headers["x-should-retry"] == "false"
    assert refusal(app, files["none"], key="pt-none").code == "too_many_prefixes"
    # `auto` stays within the limit.
    assert create(app, files["short"], key="pt-short").hyperparameters.n_epochs == 2
    assert refusal(app, files["short"], key="pt-short", own={"max_steps": 5}).code == "too_many_steps"


def test_a_database_that_is_away_comes_back(make_server, monkeypatch):
    app, state = make_server()
    file = upload(state)

    def away(_):
        raise QueueUnavailableError("the database of jobs cannot be reached (OperationalError).")

    with monkeypatch.context() as patched:
        patched.setattr("prefixtune.server.training.JobQueue", away)
        error = refusal(app, file)
        assert (error.status_code, error.code) == (503, "queue_unavailable")
    assert create(app, file).status == "queued"


def test_a_change_that_may_have_been_made_is_not_tried_again_by_clients(make_server, monkeypatch):
    app, state = make_server()
    file = upload(state)
    job = create(app, file)
    error = QueueUnavailableError("the connection is lost")
    get = JobQueue.get
    looks = []

    def get_once(queue, job_id):
        looks.append(job_id)
        if len(looks) > 2:
            raise error
        return get(queue, job_id)

    with monkeypatch.context() as patched:
        patched.setattr(JobQueue, "get", get_once)
        response = asyncio.run(send(app, "POST", f"/v1/fine_tuning/jobs/{job.id}/cancel"))
    assert (response.status, response.code) == (503, "queue_unavailable")
    assert (response.headers["x-should-retry"], response.headers.get("retry-after")) == ("false", None)
    assert ask(app, lambda client: client.fine_tuning.jobs.retrieve(job.id)).status == "cancelled"


def test_a_data_folder_that_cannot_be_used_is_said_without_its_path(make_server, tmp_path, caplog):
    (tmp_path / "data").write_text("no folder")
    app, _ = make_server(database_url=f"sqlite:///{tmp_path / 'shared.sqlite'}")
    response = asyncio.run(send(app, "GET", "/v1/fine_tuning/jobs"))
    assert (response.status, response.code) == (503, "training_unavailable")
    assert response.headers["x-should-retry"] == "false"
    assert str(tmp_path) not in response.body.decode()
    logged = [record for record in caplog.records if record.message == "training_unavailable"]
    assert str(tmp_path / "data") in logged[0].fields["reason"]


def test_a_database_that_is_locked_stops_no_other_request(make_server):
    app, state = make_server()
    create(app, upload(state))
    release = threading.Event()

    async def run():
        stuck = [asyncio.ensure_future(state.training.ask(lambda _: release.wait(20))) for _ in range(32)]
        await asyncio.sleep(0)
        statuses = [(await send(app, "GET", path)).status for path in ("/v1/models", "/v1/files")]
        release.set()
        return statuses, await asyncio.gather(*stuck)

    assert asyncio.run(run())[0] == [200, 200]


def test_a_full_disk_is_said_and_leaves_nothing(make_server, monkeypatch):
    app, state = make_server()
    file = upload(state)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("prefixtune.jobs.folder._put", full)
        error = refusal(app, file)
    assert (error.status_code, error.code) == (507, "storage_failed")
    assert left(state) == ([], [])
