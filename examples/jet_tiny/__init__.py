"""How jet-tiny was made: corpus, recall task, training form of the model, optimiser, evaluation."""
