"""Ten prompts: languages, code, numbers, a list, one word, and a few hundred tokens."""

_PARAGRAPH = (
    "A linear attention layer keeps a state of fixed size instead of a cache that grows with the context. Each token "
    "reads from the state, and writes a correction to it: the difference between its value and what the state already "
    "returns for its key, scaled by a learned step. Old content decays by a gate. "
)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n: int) -> int:\n    ",
    "Q: A train travels 60 km in 45 minutes. What is its speed in km/h?\nA:",
    "Die Hauptstadt von Österreich heißt",
    "中国最长的河流是",
    "1, 1, 2, 3, 5, 8, 13,",
    "Shopping list:\n- bread\n- milk\n-",
    '{"name": "Ada", "born": 1815, "field":',
    "Hello",
    _PARAGRAPH * 4 + "In one sentence:",
)
