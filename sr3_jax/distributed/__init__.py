"""Several devices and several processes.

`sharding`: `make_mesh`, the rule that shards the state, and batches between host and devices. `processes`:
`start_processes`, which joins the processes of a job. `signals`: `stop_signals`, stop requests as a value to poll.
"""
