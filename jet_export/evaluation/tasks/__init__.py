"""Local tasks of `jet-export eval`: YAML files of lm-evaluation-harness, and what generates their documents.

A task's documents come from its seed, the bundle's tokenizer, its max_seq_len and a local text: nothing is downloaded.
The functions get the harness's metadata as keywords, which `settings` reads.
"""
