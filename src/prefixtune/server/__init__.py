"""One frozen model and many prefixes over HTTP: OpenAI's endpoints, tasks, administration and a playground page.

A request passes `middleware` (request id, security headers, log line, metrics) and its `api.endpoint` (who calls, and
whether they may). Its body becomes a `GenerationRequest` (`api.protocol`), then requests of the engine
(`api.generation`), whose outputs become the response. `limits` holds what a request may ask for and how many run at
once; `models` holds what can be served.

Tensors, slots and schedules are the engine's: nothing here knows them. `models`, `limits`, `auth`, `metrics` and
`settings` know no routes.

Nothing is imported here, so that `prefixtune serve --help` answers at once.
"""
