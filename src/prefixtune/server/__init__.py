"""One frozen model and many prefixes over HTTP: OpenAI's endpoints, tasks and a playground page.

A request passes `middleware` (request id, security headers, log line, metrics) and its `api.endpoint` (who calls, asked
before the body is read, and whether they may). Its body becomes a `GenerationRequest` (`api.protocol`), then requests
of the engine (`api.generation`), whose outputs become the response. `auth` holds what a key may ask for and how much
runs at once; `prefixes` and `catalog` hold what can be served.

Tensors, slots and schedules are the engine's: nothing here knows them. `prefixes`, `catalog`, `auth`, `metrics` and
`settings` know no routes.

Nothing is imported here, so that `prefixtune serve --help` answers at once.
"""
