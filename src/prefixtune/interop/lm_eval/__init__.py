"""lm-eval (EleutherAI's evaluation harness) measures a backbone with prefixes on its tasks.

model        the class that lm-eval calls: `PrefixLM`, registered there as `prefixtune`
likelihood   log-likelihoods of continuations, each with its own prefix; a shared context is computed once
responses    answers so far, in a file, so that a stopped evaluation goes on
tasks        lm-eval's tasks by name, loaded before the model
run          lm-eval's `simple_evaluate` with such a model, and lm-eval's files

Importing this package does not load lm-eval; `model`, `tasks` and `run` do.
"""
