"""Two replicas over one folder, behind nginx with the configuration in deploy/.

Slow: two servers and nginx start.
"""

import contextlib
import getpass
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from live_server import MODEL, HttpClient, fill_folder, make_prefix, serve

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx on the PATH; on Debian: apt install nginx-light")

CONFIGURATION = Path(__file__).resolve().parents[2] / "deploy" / "nginx.conf"


@pytest.fixture(scope="module")
def backbone(folder):
    return fill_folder(folder, keys={"me": "admin = true"})


@pytest.fixture(scope="module")
def replicas(folder, backbone):
    replicas = [serve(folder) for _ in range(2)]
    yield replicas
    for replica in replicas:
        replica.stop()


@pytest.fixture(scope="module")
def proxy(folder, replicas):
    with nginx(folder, replicas) as proxy:
        yield proxy


@contextlib.contextmanager
def nginx(folder, replicas):
    """The configuration of deploy/ with other ports, and nothing but this test's folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    text = CONFIGURATION.read_text().replace("listen 127.0.0.1:8080;", f"listen {address};")
    assert address in text
    for port, replica in zip((8001, 8002), replicas, strict=True):
        text = text.replace(f"127.0.0.1:{port}", replica.url.removeprefix("http://"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"    {kind}_temp_path {folder / kind};\n" for kind in kinds)
    text = text.replace("http {\n", f"http {{\n    access_log off;\n{places}", 1)
    path = folder / "nginx.conf"
    own = f"daemon off;\npid {folder / 'pid'};\nerror_log {folder / 'log'};\nuser {getpass.getuser()};\n"
    path.write_text(own + text)
    process = subprocess.Popen([str(NGINX), "-e", str(folder / "log"), "-p", str(folder), "-c", str(path)])
    proxy = HttpClient(f"http://{address}")

    def answers():
        try:
            return proxy.get("/healthz")[0] == 200
        except OSError:
            return False

    proxy.until(answers)
    try:
        yield proxy
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(10)


def test_two_replicas(proxy, replicas, folder, backbone):
    file = make_prefix(backbone, folder / "one.safetensors", 1).read_bytes()
    a_prefix_uploaded_to_one_is_served_by_both(proxy, replicas, file)
    pieces_arrive_as_they_are_generated(proxy, replicas)
    # The last: one of them is gone afterwards.
    no_request_is_refused_while_one_replica_stops(proxy, replicas)


def test_a_request_to_train_reaches_one_replica_alone(tmp_path):
    """A replica that breaks off may have taken the job: the other one must not get it as well."""
    posts = []

    class Replica(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def do_POST(self):
            posts.append(self.path)
            self.close_connection = True

    with contextlib.ExitStack() as stack:
        replicas = []
        for _ in range(2):
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Replica))
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            replicas.append(SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}"))
        for path, sent in (("/v1/fine_tuning/jobs", 1), ("/v1/completions", 1)):
            posts.clear()
            # Started anew, as it leaves out a replica that failed.
            (folder := tmp_path / path.replace("/", "_")).mkdir()
            with nginx(folder, replicas) as proxy, contextlib.suppress(ValueError):  # It answers with a page.
                proxy.post(path, {"model": MODEL})
            assert posts == [path] * sent


def complete(proxy, model=MODEL, **more):
    body = {"model": model, "prompt": "abc", "max_tokens": 10, "temperature": 0, **more}
    return proxy.post("/v1/completions", body, key="pt-me")


def a_prefix_uploaded_to_one_is_served_by_both(proxy, replicas, file):
    kind = {"Content-Type": "application/octet-stream"}
    assert proxy.request("PUT", "/v1/models/one", file, key="pt-me", headers=kind)[0] == 201
    for replica in replicas:
        replica.until(lambda replica=replica: replica.get("/v1/models/one", key="pt-me")[0] == 200, 5)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(proxy, "one"), range(40)))
    assert {status for status, _, _ in answers} == {200}
    assert len({answer["choices"][0]["text"] for _, answer, _ in answers}) == 1
    for replica in replicas:
        assert replica.metric("prefixtune_texts_total", key="pt-me", prefix="one") > 5


def pieces_arrive_as_they_are_generated(proxy, replicas):
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="pt-me", max_retries=0) as client:
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=500, temperature=0, stream=True)
        next(iter(stream))
        # The rest is still being written.
        assert [len(each.get("/v1/status", key="pt-me")[1]["running"]) for each in replicas].count(1) == 1
        stream.close()
        for replica in replicas:
            replica.until(lambda replica=replica: not replica.get("/v1/status", key="pt-me")[1]["running"], 5)


def no_request_is_refused_while_one_replica_stops(proxy, replicas):
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(complete, proxy, max_tokens=60) for _ in range(80)]
        replicas[0].until(lambda: futures[10].done(), 20)
        assert replicas[0].stop() == 0
        assert [future.result()[0] for future in futures] == [200] * 80
    assert complete(proxy)[0] == 200
    assert proxy.get("/metrics")[0] == 404
