"""Tasks: what a model is fine-tuned and tested on. `base` is what a task is, `classification` and `retrieval`
the kinds that there are, `datasets` the record of each published data set. A task in a file of one's own:
`task=my_task.py` (docs/extending.md)."""
