"""`LLM(bundle).generate(...)`: text in, text out, over continuous batching (batching.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.load import load_engine
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.grammar import Grammar
from jet_export.runtime.params import Output, Params, end_tokens
from jet_export.runtime.runner import Runner
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import OnOutput, RunningSequence
from jet_export.runtime.sessions import Session, Sessions
from jet_export.runtime.snapshot import Snapshot
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer, load_eos, load_tokenizer
from jet_export.utils.errors import JetExportError

OnToken = Callable[[int, int], None]  # (index of the prompt, token)
Prompts = str | Sequence[str] | Sequence[Sequence[int]]


@dataclass
class Completion:
    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" (end-of-sequence token, or end of the grammar) or "length"
    logits: Tensor | None = None  # [len(token_ids), vocab] on the CPU, with return_logits


def offline(engine: Engine, deterministic: bool) -> Serving:
    """Whatever is asked for waits its turn; steps are as long as the engine takes."""
    limits = engine.limits
    return Serving(
        token_budget=None if deterministic else max(limits.max_batch_size, limits.max_prefill_tokens),
        max_waiting=2**62,
        wait_timeout=math.inf,
        deterministic=deterministic,
        prefix_cache_bytes=0,
    )


class LLM(Sessions):
    """A loaded bundle: its engine, its state pools and its tokenizer.

    If the bundle's limits need more memory than is free, fewer sequences run at once, on the KV cache that fits.
    `deterministic` is batch-invariant: a prompt's tokens and logits are the same bits whatever runs with it; slower.
    `speculate` "lookup" or "mtp", or the bundle `draft`, drafts up to `drafts` tokens, which steps verify: the same
    answers. `check` False skips the check of the bundle's files.
    Raises JetExportError if the bundle is damaged or was built for another machine.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        cuda_graphs: bool = True,
        check: bool = True,
        deterministic: bool = False,
        speculate: str = "off",
        draft: str | Path | None = None,
        drafts: int | None = None,
    ) -> None:
        engine, self.manifest = load_engine(bundle, check)
        serving = offline(engine, deterministic)
        self._open(
            engine,
            load_tokenizer(bundle),
            load_eos(bundle, self.manifest.config.eos_token_id, self.manifest.config.vocab_size),
            replace(serving, speculate=speculate, draft=None if draft is None else str(draft), drafts=drafts),
            fingerprint=self.manifest.fingerprint,
            cuda_graphs=cuda_graphs,
        )

    @classmethod
    def over(
        cls,
        engine: Engine,
        tokenizer: Tokenizer | ByteTokenizer,
        eos: int | Sequence[int],
        *,
        fingerprint: str = "",
        cuda_graphs: bool = True,
        deterministic: bool = False,
        speculate: str = "off",
    ) -> LLM:
        """An LLM over a loaded engine. `fingerprint` identifies its bundle, for sessions."""
        llm = cls.__new__(cls)
        serving = replace(offline(engine, deterministic), speculate=speculate)
        llm._open(engine, tokenizer, eos, serving, fingerprint=fingerprint, cuda_graphs=cuda_graphs)
        return llm

    def _open(
        self,
        engine: Engine,
        tokenizer: Tokenizer | ByteTokenizer,
        eos: int | Sequence[int],
        serving: Serving,
        *,
        fingerprint: str,
        cuda_graphs: bool,
    ) -> None:
        self.engine, self.tokenizer, self.fingerprint = engine, tokenizer, fingerprint
        self.batching = BatchingEngine(engine, tokenizer, eos, serving, cuda_graphs=cuda_graphs)

    @property
    def eos(self) -> tuple[int, ...]:
        """End-of-sequence tokens."""
        return self.batching.eos

    @eos.setter
    def eos(self, tokens: int | Sequence[int]) -> None:
        self.batching.eos = self.batching.executor.eos = end_tokens(tokens)

    @property
    def runner(self) -> Runner:
        return self.batching.runner

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        return_logits: bool = False,
        ignore_eos: bool = False,
        on_token: OnToken | None = None,
        session: Session | Sequence[Session] | None = None,
        grammar: Grammar | None = None,
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids) by at most `max_new_tokens`.

        Greedy by default; with `temperature` > 0 prompt i is sampled with `seed` + i. `on_token(i, token)` is called
        with each token as it is generated. `session`, one per prompt: the prompt, which may be empty, continues the
        session, and the session then holds the prompt and the completion too. `grammar`: every completion matches it.
        Raises JetExportError for an empty prompt, ids outside the vocabulary, and prompts too long for max_seq_len.
        """
        listed: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        sessions = self._sessions(session, len(listed))
        rows = [self._encode(p, i, max_new_tokens, s) for i, (p, s) in enumerate(zip(listed, sessions, strict=True))]
        params = [
            Params(
                max_new_tokens,
                Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed + i),
                ignore_eos=ignore_eos,
                grammar=grammar,
            )
            for i in range(len(rows))
        ]
        return self._run(rows, params, sessions, on_token, return_logits)

    def session(self, prompt: str | Sequence[int] = "") -> Session:
        """A new session that holds `prompt`, text or token ids; pass it to `generate` to continue from there.

        Raises JetExportError as `generate` does.
        """
        session = self.new_session()
        if len(prompt):
            ids = self._encode(prompt, 0, 1, None)
            sequence = self.batching.submit(ids, Params(1), lambda _: None, keep="prompt", text=False)
            while self.batching.step():
                pass
            session.snapshot = self._final_snapshot(sequence, 0)
        return session

    def _sessions(self, given: Session | Sequence[Session] | None, n: int) -> Sequence[Session | None]:
        if given is None:
            return [None] * n
        sessions = [given] if isinstance(given, Session) else list(given)
        if len(sessions) != n:
            raise JetExportError(f"{n} prompts and {len(sessions)} sessions.", "Give one session for each prompt.")
        if len({id(s) for s in sessions}) < n:
            raise JetExportError("The same session is given for two prompts.", "Fork it: llm.fork(session).")
        for s in sessions:
            s.check(self.fingerprint)
        return sessions

    def _encode(self, prompt: str | Sequence[int], i: int, max_new_tokens: int, session: Session | None) -> list[int]:
        held = len(session.snapshot.tokens) if session else 0
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, special_tokens=not held)
        else:
            ids = [int(t) for t in prompt]
        if max_new_tokens < 1:
            raise JetExportError(f"max_new_tokens is {max_new_tokens}.", "Ask for at least 1.")
        if not ids and not held:
            raise JetExportError(f"prompt {i} is empty.", "Give at least one token.")
        bad = [t for t in ids if not 0 <= t < self.engine.config.vocab_size]
        if bad:
            raise JetExportError(f"prompt {i}: token {bad[0]} is not below vocab_size {self.engine.config.vocab_size}.")
        limit = self.engine.limits.max_seq_len
        if held + len(ids) + max_new_tokens > limit:
            before = f"a session of {held} tokens, " if held else ""
            raise JetExportError(
                f"prompt {i}: {before}{len(ids)} tokens and {max_new_tokens} new ones exceed the bundle's max_seq_len "
                f"{limit}.",
                "Shorten the prompt, ask for fewer tokens, or build with a larger --max-seq-len.",
            )
        return ids

    def _run(
        self,
        rows: list[list[int]],
        params: list[Params],
        sessions: Sequence[Session | None],
        on_token: OnToken | None,
        keep_logits: bool,
    ) -> list[Completion]:
        outputs: list[tuple[int, Output]] = []
        running: list[RunningSequence] = []

        def collector(i: int) -> OnOutput:
            return lambda output: outputs.append((i, output))

        try:
            for i, (row, p, s) in enumerate(zip(rows, params, sessions, strict=True)):
                sequence = self.batching.submit(
                    row,
                    p,
                    collector(i),
                    start=s.snapshot if s else None,
                    keep="end" if s else None,
                    keep_logits=keep_logits,
                    text=False,
                )
                running.append(sequence)
            while self.batching.step():
                for i, output in outputs:
                    if on_token and output.token is not None:
                        on_token(i, output.token)
                outputs.clear()
        finally:
            for r in running:
                self.batching.cancel(r)
        for i, (r, s) in enumerate(zip(running, sessions, strict=True)):
            if s:
                s.snapshot = self._final_snapshot(r, i)
        return [self._completion(r, i) for i, r in enumerate(running)]

    def _completion(self, sequence: RunningSequence, i: int) -> Completion:
        if sequence.finish_reason not in ("stop", "length"):
            raise self._failed(i) from self.batching.failure
        logits = torch.stack(sequence.logits) if sequence.logits else None
        text = self.tokenizer.decode(sequence.tokens)
        return Completion(text, sequence.tokens, sequence.finish_reason, logits)

    def _final_snapshot(self, sequence: RunningSequence, i: int) -> Snapshot:
        if sequence.snapshot is None:
            raise self._failed(i) from self.batching.failure
        return sequence.snapshot

    def _failed(self, i: int) -> JetExportError:
        return JetExportError(f"prompt {i}: the engine failed ({self.batching.failure}).")
