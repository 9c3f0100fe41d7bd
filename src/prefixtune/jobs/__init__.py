"""Training that others ask for: uploaded files, a durable queue of jobs, and workers that train and publish.

`files` and `queue` are what a server needs; `worker`, `trainer` and `publish` are what a worker needs. Nothing here
knows HTTP. The database holds ids, names and numbers; data, states and prefixes are files of the data folder.
"""
