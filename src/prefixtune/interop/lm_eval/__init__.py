"""lm-eval (EleutherAI's evaluation harness) measures a backbone with a prefix on its tasks.

model        the class that lm-eval calls: `PrefixLM`, registered there as `prefixtune`
likelihood   log-likelihoods of continuations; a shared context is computed once

Importing this package does not load lm-eval; `model` does.
"""
