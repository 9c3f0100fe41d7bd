"""`/v1/models`: the file of a prefix that one's own job trained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asgi_client import Response, bearer, send
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


def download(app: Any, name: str, key: str = "") -> Response:
    headers = bearer(key) if key else {}
    return asyncio.run(send(app, "GET", f"/v1/models/{name}/file", headers=headers))


def test_a_result_is_downloaded_by_its_owner_and_admins(
    make_server: Callable[..., Any], backbone: Any, tmp_path: Path, random_prefix: Callable[..., Any]
) -> None:
    rules = {name: KeyConfig(hash=hash_key(f"pt-{name}"), admin=name == "boss") for name in ("ann", "bob", "boss")}
    app, state = make_server(keys=rules)
    header = {**make_header(backbone), "job": {"id": "ftjob-1", "owner": "ann"}}
    path = save_prefix(tmp_path / "prefixes" / "hers.safetensors", Prefix(random_prefix(backbone, 4, 3).layers, header))
    state.store.reload()
    answer = download(app, "hers", "ann")
    assert (answer.status, answer.body) == (200, path.read_bytes())
    assert answer.headers["content-length"] == str(path.stat().st_size)
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''hers.safetensors"
    assert download(app, "hers", "boss").body == path.read_bytes()
    assert download(app, "a", "boss").status == 200
    # A prefix that no job of hers made, and one that does not exist.
    assert (download(app, "a", "ann").status, download(app, "nothing", "ann").status) == (403, 404)
    assert download(app, "hers", "bob").status in (403, 404)
    assert download(app, "nothing", "boss").status == 404
    path.write_bytes(b"broken")
    assert download(app, "hers", "boss").status == 503
    path.unlink()
    assert download(app, "hers", "boss").status == 404


def test_without_keys_every_result_is_downloaded(
    make_server: Callable[..., Any], backbone: Any, tmp_path: Path, random_prefix: Callable[..., Any]
) -> None:
    app, state = make_server()
    header = {**make_header(backbone), "job": {"id": "ftjob-1", "owner": "ann"}}
    save_prefix(tmp_path / "prefixes" / "hers.safetensors", Prefix(random_prefix(backbone, 4, 3).layers, header))
    state.store.reload()
    assert download(app, "hers").status == 200
    assert download(app, "a").status == 403
