"""Pick three memories for a question with BM25, join them, and answer. The model reads no document."""

from __future__ import annotations

import argparse
import json
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path

import bm25s
from make import QUESTIONS, make_facts

import prefixtune
from prefixtune.prefix.compose import concatenate


def build_index(folder: Path) -> Callable[[str, int], list[str]]:
    """A function that finds memories by the words of their documents: the names of the best, the best one first."""
    paths = sorted(path for path in folder.glob("*.txt") if path.with_suffix(".safetensors").exists())
    texts = [path.read_text(encoding="utf-8") for path in paths]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def find(question: str, count: int) -> list[str]:
        words = bm25s.tokenize([question], show_progress=False)
        found, _ = index.retrieve(words, k=min(count, len(paths)), show_progress=False)
        return [paths[number].stem for number in found[0]]

    return find


def answer_in_process(args: argparse.Namespace) -> Callable[[str, list[str]], str]:
    """A function that answers over joined memories, with the model in this process."""
    backbone = prefixtune.load_backbone(args.backbone)

    def answer(question: str, names: list[str]) -> str:
        memories = [prefixtune.load_prefix(args.memories / f"{name}.safetensors", backbone) for name in names]
        joined = concatenate(memories, backbone.rotation)
        return prefixtune.generate(backbone, [question], joined, max_new_tokens=8)[0].strip()

    return answer


def answer_over_http(args: argparse.Namespace) -> Callable[[str, list[str]], str]:
    """The same by a server that joins them: `prefixtune serve --prefixes memories`."""

    def answer(question: str, names: list[str]) -> str:
        body = {"prefixes": names, "prompt": question, "max_tokens": 8, "temperature": 0}
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        request = urllib.request.Request(f"{args.server}/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=300) as response:
            return str(json.load(response)["choices"][0]["text"]).strip()

    return answer


def score(args: argparse.Namespace, find: Callable[..., list[str]], answer: Callable[..., str]) -> None:
    """Count right answers to wordings that no memory was trained on, with several memories and with the right one."""
    facts = {name: fact for name, fact in make_facts(100).items() if (args.memories / f"{name}.safetensors").exists()}
    asked = [
        (name, wordings[2].format(**facts[name]), facts[name][key]) for name in facts for key, *wordings in QUESTIONS
    ]
    asked = random.Random(1).sample(asked, min(args.score, len(asked)))
    found = [find(question, args.join) for _, question, _ in asked]
    num_found = sum(name in names for (name, *_), names in zip(asked, found, strict=True))
    joined = sum(answer(text, names) == right for (_, text, right), names in zip(asked, found, strict=True))
    alone = sum(answer(text, [name]) == right for name, text, right in asked)
    print(f"{len(asked)} questions, {len(facts)} memories: BM25's {args.join} include the right one {num_found} times")
    print(f"right answers: {joined} over {args.join} joined, {alone} over the right one alone")


def main() -> None:
    """Answer a question, or count right answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="At what time must I be on the Golden Curlew?")
    parser.add_argument("--score", type=int, default=0, help="ask so many questions about made memories instead")
    parser.add_argument("--join", type=int, default=3, help="memories for a question")
    parser.add_argument("--memories", type=Path, default=Path("memories"), help="NAME.txt and NAME.safetensors")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--server", default="", help="http://HOST:PORT of a running server; empty: in this process")
    args = parser.parse_args()
    find, answer = build_index(args.memories), (answer_over_http if args.server else answer_in_process)(args)
    if args.score:
        score(args, find, answer)
    else:
        names = find(args.question, args.join)
        print(f"{' + '.join(names)}\n{answer(args.question, names)}")


if __name__ == "__main__":
    main()
