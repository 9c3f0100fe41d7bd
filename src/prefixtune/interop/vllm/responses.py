"""The backbone's response, rewritten into a response of the prefix that the client asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefixtune.interop.vllm.folder import ServedPrefix
from prefixtune.interop.vllm.requests import BackboneRequest
from prefixtune.interop.vllm.state import ServerState
from prefixtune.prefix.header import job_origin
from prefixtune.prefix.target_stream import TargetOffsets, TargetStream
from prefixtune.prefix.text_format import TextFormat

__all__ = ["ResponseRewriter", "add_models"]


class ResponseRewriter:
    """Rewrites one response: its JSON body, or every event of its stream.

    The prefix's name comes back, placeholders are neither shown nor counted, and of each text only the target is left.

    Args:
        request: The request that is answered.
    """

    def __init__(self, request: BackboneRequest) -> None:
        self.request = request
        # Of each choice in a stream: what is held back.
        self._targets: dict[int, TargetStream] = {}
        self._offsets: dict[int, TargetOffsets] = {}

    def __call__(self, value: Any) -> Any:
        """The new value."""
        if not isinstance(value, dict):
            return value
        choices = _list_objects(value.get("choices"))
        if "model" in value:
            value["model"] = self.request.prefix.reference.name
        value.pop("kv_transfer_params", None)
        for part in (value, *choices):
            if isinstance(part.get("prompt_token_ids"), list):
                part["prompt_token_ids"] = part["prompt_token_ids"][self.request.prefix.reference.length :]
        if self.request.text_format is not None:
            for index, choice in enumerate(choices):
                self._extract_target(choice, choice.get("index", index), self.request.text_format)
        if isinstance(value.get("usage"), dict):
            # An event with text counts one prompt; a whole response and the end of a stream count all of them.
            num_prompts = 1 if self.request.stream and value.get("choices") else self.request.num_prompts
            self._subtract_placeholders(value["usage"], num_prompts)
        return value

    def _extract_target(self, choice: dict[str, Any], index: int, text_format: TextFormat) -> None:
        """Leave only the target of a choice's text, or of a piece of it."""
        message = next((choice[key] for key in ("message", "delta") if isinstance(choice.get(key), dict)), choice)
        key = "text" if message is choice else "content"
        stream, is_finished = self.request.stream, choice.get("finish_reason") is not None
        if not isinstance(message.get(key), str) and not (stream and choice.get("finish_reason")):
            return
        text = message.get(key) or ""
        if stream:
            target_stream = self._targets.setdefault(index, TargetStream(text_format))
            message[key] = target_stream.add(text, last=is_finished)
        else:
            message[key] = text_format.extract_target(text)
        if key == "text" and "logprobs" in choice:
            offsets = self._offsets.setdefault(index, TargetOffsets(text_format))
            choice["logprobs"] = offsets.add(message[key], choice["logprobs"], last=is_finished or not stream)

    def _subtract_placeholders(self, usage: dict[str, Any], num_prompts: int) -> None:
        num_placeholders = self.request.prefix.reference.length * num_prompts
        for key in ("prompt_tokens", "total_tokens"):
            if isinstance(usage.get(key), int):
                usage[key] -= num_placeholders
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            details["cached_tokens"] = max(details["cached_tokens"] - num_placeholders, 0)


def add_models(value: Any, prefixes: Mapping[str, ServedPrefix], state: ServerState) -> Any:
    """The list of models, with the prefixes added, and the kind of each, as with the embedded engine.

    Checkpoints of jobs have names, too, but are left out.
    """
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        for model in _list_objects(value["data"]):
            if model.get("id") in state.own_names:
                model["kind"] = "backbone"
        made_by = {name: job_origin(prefix.header) for name, prefix in prefixes.items() if name not in state.own_names}
        listed = [(name, prefixes[name], by) for name, by in made_by.items() if by is None or by.step is None]
        value["data"] += [
            {
                "id": name,
                "object": "model",
                "created": prefix.created,
                "owned_by": "prefixtune" if origin is None else origin.owner,
                "root": state.model_name,
                "parent": state.model_name,
                "kind": "prefix",
                "description": prefix.description,
                "prefix_length": prefix.reference.length,
                **({} if origin is None else {"job": origin.id}),
            }
            for name, prefix, origin in listed
        ]
    return value


def _list_objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
