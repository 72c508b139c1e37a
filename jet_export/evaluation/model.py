"""An engine as a model of lm-evaluation-harness (lm_eval.api.model.LM).

Tokens, windows and truncation are those of the harness's `local-completions` against `jet-export serve`, and so are the
numbers, bit for bit where both are deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jet_export.evaluation.requests import Answer, run_requests
from jet_export.model.hf_files import TOKENIZER_CONFIG, tokenizer_directory
from jet_export.runtime.llm import LLM
from jet_export.runtime.params import Params
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer
from jet_export.utils.errors import JetExportError
from jet_export.utils.schema import read_json_object

Scored = tuple[float, bool]  # (log probability of a continuation, whether greedy decoding would give it)
Pair = tuple[Any, list[int], list[int]]  # (the harness's key, tokens of the context, tokens of the continuation)
Progress = Callable[[str, int, int], None]  # what runs, how many of its requests have ended, how many there are

MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness
LOGLIKELIHOOD = Params(1, prompt_logprobs=1, ignore_eos=True)


def prefix_token(directory: Path, tokenizer: Tokenizer | ByteTokenizer, eos: tuple[int, ...]) -> int:
    """What stands before a text that is scored from its first token on: tokenizer_config.json's bos_token, else its
    eos_token, else the model's end of sequence."""
    path = tokenizer_directory(directory) / TOKENIZER_CONFIG
    config = read_json_object(path)
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text and isinstance(text, str) and isinstance(tokenizer, Tokenizer):
            return tokenizer.encode(text, special_tokens=False)[0]
    return eos[0] if eos else 0


class EngineLM(TemplateLM):
    """An LLM for the harness. `truncated` counts the requests of each kind whose beginning was cut off."""

    def __init__(self, llm: LLM, prefix: int, progress: Progress = lambda kind, done, total: None) -> None:
        super().__init__()
        self.llm, self.prefix, self.progress = llm, prefix, progress
        self.max_length = llm.engine.limits.max_seq_len - 1  # every request generates a token
        self.truncated: Counter[str] = Counter()
        self.tokens = 0  # of all prompts that have run

    @property
    def eot_token_id(self) -> int:
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.llm.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Without special tokens, whatever is asked for, as `local-completions`."""
        return self.llm.tokenizer.encode(string, special_tokens=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = False, **_: Any) -> list[Scored]:
        return self.score(requests, "loglikelihood")

    def score(self, requests: list[Pair], kind: str) -> list[Scored]:
        """Log probabilities of continuations. What is too long for the engine loses its beginning, and is counted."""
        prompts, starts = [], []
        for _, context, continuation in requests:
            cut = max(0, len(context) + len(continuation) - self.max_length)
            self.truncated[kind] += cut > 0
            prompts.append([*context, *continuation][cut:])
            starts.append(max(1, len(context) - cut))  # a first token has no log probability
        scores: list[Scored] = [(0.0, True)] * len(requests)

        def take(i: int, answer: Answer) -> None:
            found = answer.prompt_logprobs[starts[i] - 1 :]
            scores[i] = (sum((p.chosen for p in found), 0.0), all(p.chosen == p.top[0][1] for p in found))

        self._run(kind, [(p, LOGLIKELIHOOD) for p in prompts], take)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Pair] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owner.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self.score(windows, "loglikelihood_rolling"), strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._generation(*request.args) for request in requests]
        texts = [""] * len(requests)

        def take(i: int, answer: Answer) -> None:
            texts[i] = answer.text

        self._run("generate_until", asked, take)
        return texts

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[list[int], Params]:
        """(prompt, params) of a request of `generate_until`."""
        given = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        new = given["max_gen_toks"]
        room = self.max_length - new
        if room < 1:
            raise JetExportError(
                f"A task generates up to {new} tokens; the bundle's max_seq_len is {self.max_length + 1}.",
                "Build with a larger --max-seq-len.",
            )
        prompt = self.tok_encode(context) or [self.prefix]
        self.truncated["generate_until"] += len(prompt) > room
        sampling = Sampling(
            temperature=float(given.get("temperature", 0.0)) if given["do_sample"] else 0.0,
            top_k=int(given.get("top_k", 0)),
            top_p=float(given.get("top_p", 1.0)),
        )
        return prompt[-room:], Params(new, sampling, stop=tuple(s for s in given["until"] if s))

    def _run(self, kind: str, asked: list[tuple[list[int], Params]], take: Callable[[int, Answer], None]) -> None:
        """Longest first: the shortest end the run, when fewer and fewer are left to fill the engine's slots."""
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))
        ended = 0
        self.progress(kind, 0, len(order))

        def on_end(k: int, answer: Answer) -> None:
            nonlocal ended
            take(order[k], answer)
            ended += 1
            self.progress(kind, ended, len(order))

        self.tokens += sum(len(prompt) for prompt, _ in asked)
        run_requests(self.llm.batching, (asked[i] for i in order), on_end)
