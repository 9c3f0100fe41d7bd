"""Small tasks of lm-eval over local files, made up on the spot: questions with choices, texts to continue, texts."""

import json
import random

WORDS = [
    *("the", "a", "cat", "dog", "tree", "sees", "likes", "red", "blue"),
    *("under", "over", "one", "two", "and", "not", "house", "night", "train"),
]


def words(rng, least, most):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def make_tasks(folder, *, seed=0, count=12):
    """Write the tasks `made_choices`, `made_texts`, `made_rolling` and the group `made` of the first two."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    choices = [
        {
            "question": words(rng, 1, 12),
            # One choice may begin another one, and lengths differ.
            "choices": [words(rng, 1, 4) for _ in range(3)] + ["the", "the cat"],
            "answer": rng.randrange(5),
        }
        for _ in range(count)
    ]
    texts = [{"source": words(rng, 1, 10), "target": words(rng, 2, 5)} for _ in range(count)]
    rolling = [{"text": words(rng, 1, 90)} for _ in range(count)]
    _write_task(
        folder,
        "made_choices",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{question}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    _write_task(
        folder,
        "made_texts",
        texts,
        output_type="generate_until",
        doc_to_text="{{source}} =",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n", "ab"], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    _write_task(
        folder,
        "made_rolling",
        rolling,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    group = {"group": "made", "task": ["made_choices", "made_texts"]}
    (folder / "made.yaml").write_text(json.dumps(group), encoding="utf-8")
    return folder


def evaluate(model, folder, tasks, **options):
    """lm-eval's results of a model on tasks of this folder, and its answers by task and document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    answers = {
        task: {sample["doc_id"]: [one for (one,) in sample["resps"]] for sample in samples}
        for task, samples in results["samples"].items()
    }
    return {"results": results["results"], "answers": answers, "samples": results["samples"]}


def _write_task(folder, name, rows, **settings):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1},
        **settings,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
