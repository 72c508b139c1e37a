"""`jet-export postnas`: from a full-attention teacher to a Jet model in the paper's four steps and a retrofit.

`recipe` says what to do, `run` goes through the steps, `placement`, `comparison` (blocks and designs), `shapes` and
`retrofit` are the steps, `report` is the page.
"""
