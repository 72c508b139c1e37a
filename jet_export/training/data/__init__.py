"""Training data: documents from files and datasets, tokenised, packed into rows, resumable to the exact row.

`data.shards` streams (`shard`) are independent of each other and of the number of processes: a process reads whole ones
of them, so that a step's rows are the same however many processes there are.
"""
