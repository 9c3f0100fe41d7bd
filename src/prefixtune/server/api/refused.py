"""Endpoints of OpenAI's and vLLM's that this server does not have: why, and the way out."""

from __future__ import annotations

__all__ = ["refused_endpoint"]


_NO_EMBEDDINGS = "embeddings are not served: the backbone generates. Use a server for embedding models, or /classify"
_NO_STATE = "this server keeps nothing between requests"
_USE_CHAT = "Use /v1/chat/completions with the whole conversation"
_REFUSED = {
    "/v1/responses": f"the Responses API is not served: {_NO_STATE}. {_USE_CHAT}",
    "/v1/conversations": f"conversations are not stored: {_NO_STATE}. {_USE_CHAT}",
    "/v1/assistants": f"assistants are not served: {_NO_STATE}. {_USE_CHAT}",
    "/v1/threads": f"threads are not served: {_NO_STATE}. {_USE_CHAT}",
    "/v1/messages": "Anthropic's API is not served. Use /v1/chat/completions",
    "/v1/embeddings": _NO_EMBEDDINGS,
    "/embeddings": _NO_EMBEDDINGS,
    "/pooling": _NO_EMBEDDINGS,
    "/v1/images": "images are neither generated nor read: the backbone is a language model. Send text",
    "/v1/audio": "audio is neither generated nor read: the backbone is a language model. Send text",
    "/v1/realtime": "the Realtime API is not served. Use /v1/chat/completions with stream",
    "/v1/videos": "videos are not generated: the backbone is a language model. Send text",
    "/v1/moderations": "moderation is not served. Train a prefix that classifies, and use /classify",
    "/v1/score": "texts are not compared. Use /classify, or echo with logprobs in /v1/completions",
    "/score": "texts are not compared. Use /classify, or echo with logprobs in /v1/completions",
    "/v1/rerank": "texts are not ranked. Use echo with logprobs in /v1/completions",
    "/rerank": "texts are not ranked. Use echo with logprobs in /v1/completions",
    "/v1/batches": "batches are not stored. Send the requests to /v1/completions at once; they are computed together",
    "/v1/uploads": "files are not uploaded in parts. Use /v1/files",
    "/v1/fine_tuning": "there are neither graders nor permissions. Training is at /v1/fine_tuning/jobs",
    "/v1/load_lora_adapter": "LoRA adapters are not served. Upload a prefix to /admin/prefixes/NAME",
    "/tokenize": "tokens are not served. Use echo with logprobs in /v1/completions, or the model's tokenizer",
    "/detokenize": "tokens are not served. Use the model's tokenizer",
}


def refused_endpoint(path: str) -> str:
    """Why there is nothing at a path that clients of other servers know; empty: nothing is known of it.

    >>> refused_endpoint("/v1/batches/batch_1")[:23]
    'batches are not stored.'
    """
    for known, why in _REFUSED.items():
        if path == known or path.startswith(f"{known}/"):
            return f"{why}."
    return ""
