"""One frozen model and many prefixes over HTTP: OpenAI's interface, an endpoint of tasks, administration, a page.

A call goes through the `edge` (ids, headers, logs, figures), an `endpoint` (who asks, and may they), and becomes an
*ask* (`asks`, `forms`), then a *job* of the engine (`jobs`), then a *reply* (`replies`). Knows nothing of attention,
slots and schedules: those are the engine's.

Nothing is imported here, so that `prefixtune serve --help` answers at once.
"""
