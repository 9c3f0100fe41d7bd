"""`prefixtune serve` in a process of its own over a tiny model and random prefixes, for tests of the server."""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

from forked_command import ForkedCommand

MODEL = "tiny-chat"
POSITIONS = 512

# The chat template of the tiny model; refuses a chat that does not begin with the user or the system.
TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the assistant cannot begin') }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_model(folder, *, template=True, positions=POSITIONS):
    """A tiny LLaMA that never generates its end token, stored as a user would store one."""
    import torch

    import zoo

    tokenizer = zoo.make_tokenizer()
    model = zoo.make_model("llama", tokenizer, num_hidden_layers=2, max_position_embeddings=positions)
    with torch.no_grad():
        # Special tokens are never the likeliest: every text is as long as requested.
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"])] = 0.0
    if template:
        tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_prefix(backbone, path, seed, *, length=4, **header):
    """A random prefix as an artifact."""
    from prefixtune.backbone.prefixes import make_header
    from prefixtune.prefix.prefix import save_prefix
    from random_prefixes import random_prefix

    return save_prefix(path, random_prefix(backbone, length, seed, header=make_header(backbone, **header)))


def fill_folder(folder, prefixes=None, settings="", keys=None, **model):
    """Put what a server needs into a folder; returns the backbone.

    Args:
        folder: Where to.
        prefixes: Names of random prefixes -> what their headers say, and `length`.
        settings: Lines of the configuration.
        keys: Names of keys -> lines of their rules; the key itself is `pt-` and the name.
        **model: Of `make_model`.
    """
    from prefixtune.backbone.load import load_backbone
    from prefixtune.server.auth import hash_key

    backbone = load_backbone(make_model(folder / MODEL, **model), dtype="float32", device="cpu")
    (folder / "prefixes").mkdir()
    for seed, (name, header) in enumerate((prefixes or {}).items()):
        make_prefix(backbone, folder / "prefixes" / f"{name}.safetensors", seed, **header)
    tables = (f'[keys.{name}]\nhash = "{hash_key(f"pt-{name}")}"\n{rules}\n' for name, rules in (keys or {}).items())
    (folder / "serve.toml").write_text(f"{settings}\n{''.join(tables)}")
    return backbone


def serve(folder, *flags, **options):
    """A server over what `fill_folder` put into a folder, once it serves."""
    config = ("--config", str(folder / "serve.toml"))
    return LiveServer(folder / MODEL, folder / "prefixes", *config, *flags, **options).wait()


def generate_alone(backbone, prefixes, prompt, name, **sampling):
    """The text of one request that is alone in the batch, white space around it included."""
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.engine.engine import TorchEngine
    from prefixtune.engine.request import Request, SamplingParams

    prefix = None if name is None else load_prefix(prefixes / f"{name}.safetensors", backbone)
    ((output,),) = TorchEngine(backbone).run([Request(tuple(prompt), prefix, SamplingParams(**sampling))])
    text = str(backbone.decode([token.id for token in output.tokens]))
    assert text.strip() == output.text
    return text


class HttpClient:
    """Sends requests to a URL."""

    key = ""

    def __init__(self, url):
        self.url = url

    def request(self, method, path, body=None, *, key="", headers=None):
        """Status, JSON or text, and headers of the response; a body other than bytes is sent as JSON."""
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {"Authorization": f"Bearer {key or self.key}"} if key or self.key else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {**sent, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _content(answer), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _content(error), dict(error.headers)

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, body, **options):
        return self.request("POST", path, body, **options)

    def metric(self, name, key="", **labels):
        """The sum of a metric over all samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.get("/metrics", key=key)[1])
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples or labels, f"no metric {name}"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def until(self, good, seconds=10):
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not good():
            assert time.monotonic() < end, "the condition did not come true in time"
            time.sleep(0.02)


class LiveServer(HttpClient):
    """`prefixtune serve` in a process of its own."""

    def __init__(self, model, prefixes, *flags, environment=None):
        super().__init__("")
        arguments = ["--backbone", str(model), "--prefixes", str(prefixes), "--port", "0", "--dtype", "float32"]
        self.process = ForkedCommand(
            "serve",
            *arguments,
            *flags,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self.lines = []
        self.errors = []
        self._readers = [
            threading.Thread(target=self._read_log, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def wait(self, seconds=180):
        """Wait until it serves."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            started = [line for line in self.lines if line["event"] == "started"]
            if started:
                self.url = started[0]["url"]
                try:
                    if self.get("/readyz")[0] == 200:
                        return self
                except OSError:
                    pass
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.process.poll()}\n{''.join(self.errors)}")

    def _read_log(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def _read_errors(self):
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def stop(self, sig=signal.SIGTERM, seconds=30):
        """Signal it, and wait for its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


def _content(answer):
    text = answer.read().decode(errors="replace")
    return json.loads(text) if answer.headers.get_content_type() == "application/json" else text
