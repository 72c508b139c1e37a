"""`jet-export retrofit`: trains a Jet model from a full-attention teacher.

`recipe` says what to do, `data` makes packed rows, `model` is the trainable form of the model, `losses` and `objective`
are one step's, `trainer` runs a stage, `checkpoint` is what survives a kill, `run` all of it.
"""
