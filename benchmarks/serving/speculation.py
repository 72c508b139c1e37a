"""Speculative decoding against plain decoding, in one process: tokens/s at a stated acceptance, and of prompt lookup.

    python benchmarks/serving/speculation.py BUNDLE --batch 1,8,64 --acceptance 0.6,0.8,0.9 --drafts 4
    python benchmarks/serving/speculation.py BUNDLE --code FILE [FILE ...] --batch 1

The bundle verifies drafts (`jet-export build --speculate N`). Of each batch size, `--prompt` random tokens a sequence
are continued plainly by `--new` tokens, and what was answered is recorded. Then the same requests run again with drafts
of up to `--drafts` tokens from the record, each right with the probability at which the stated share of drafted tokens
is accepted: with drafts of that length always (`fixed`), and as the server chooses (`adaptive`). At 0 every draft is
wrong: what `adaptive` then costs is what speculation costs where it cannot pay. With `--code`, prompts are the first
`--prompt` tokens of text files, and drafts are looked up in them.

Random weights have no preference: their largest logits are nearly tied, calls of another shape round another way, and
the answers part from the record within a few tokens, behind which its drafts are all rejected. So of a bundle of
random weights with tied embeddings the loaded embeddings are multiplied by a power of two (`--weights decisive`, the
default there), until a token's own embedding is most of what the last norm sees: every answer then repeats its
prompt's last token by a wide margin, while the steps read the same bytes, launch the same kernels and compute on
states and activations of the same sizes. `--weights own` leaves them as they are. The result says which.

Decoding is timed while all sequences decode: from the step behind the last prompt, before which nothing is drafted, to
the one in which the first of them ends. With drafts they end far apart, and steps of the few that are left would be
timed as steps of the batch. Graphs are captured before, as by a server. Plain and speculating runs are interleaved,
after one of each that does not count. Beside the median of each stand the drafts that were accepted, and the answers
that are those of the plain run.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jet_export.backends.base import Engine
from jet_export.backends.eager import EagerEngine
from jet_export.backends.inductor.engine import InductorEngine
from jet_export.backends.load import load_engine
from jet_export.bundle.manifest import Manifest
from jet_export.runtime.batching import BatchingEngine
from jet_export.runtime.capacity import Serving
from jet_export.runtime.draft_length import expected
from jet_export.runtime.draft_model import Draw
from jet_export.runtime.drafts import LookupProposer, Proposer
from jet_export.runtime.params import Params
from jet_export.runtime.prompt_lookup import NO_MATCH, Match
from jet_export.runtime.replay import ReplayProposer
from jet_export.runtime.sampling import Sampling
from jet_export.runtime.sequence import RunningSequence
from jet_export.runtime.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from jet_export.utils.environment import device_slug, write_result
from jet_export.utils.errors import JetExportError

RESULTS = Path(__file__).resolve().parents[1] / "results"
DECISIVE = 256.0  # root mean square of an embedding; what the layers of random weights add is of the order of 1 to 10


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a batch."""

    tokens_per_s: float  # of decoding
    steps: int
    drafted: int
    accepted: int
    answers: list[RunningSequence]


class Gate:
    """A proposer that offers nothing while it is closed."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer, self.guesses, self.is_open = proposer, proposer.guesses, False

    def forget(self, sequence: RunningSequence) -> None:
        self.proposer.forget(sequence)

    def offer(self, sequence: RunningSequence, most: int) -> Match:
        return self.proposer.offer(sequence, most) if self.is_open else NO_MATCH

    def draft(self, sequences: Sequence[RunningSequence], offers: Sequence[Match], draw: Draw) -> list[list[int]]:
        return self.proposer.draft(sequences, offers, draw)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The same requests with one proposer or another."""

    engine: Engine
    tokenizer: Tokenizer | ByteTokenizer
    prompts: list[list[int]]
    new: int
    temperature: float
    drafts: int

    def batching(self, proposer: Proposer | None, fixed: bool) -> BatchingEngine:
        serving = Serving(
            slots=len(self.prompts), prefix_cache_bytes=0, drafts=self.drafts if proposer is not None else None
        )
        gate = None if proposer is None else Gate(proposer)
        made = BatchingEngine(self.engine, self.tokenizer, -1, serving, proposer=gate)
        if made.speculation:
            made.speculation.lengths.fixed = fixed
        if made.executor.verify:
            made.executor.verify.capture(least_rows=len(self.prompts))
        return made

    def run(self, batching: BatchingEngine) -> Run:
        drafts, gate = batching.metrics.drafts, batching.speculation and batching.speculation.proposer
        before = (sum(drafts.drafted), sum(drafts.accepted)) if drafts else (0, 0)
        answers = []
        for i, prompt in enumerate(self.prompts):
            params = Params(self.new, Sampling(temperature=self.temperature, seed=i), ignore_eos=True)
            answers.append(batching.submit(prompt, params, lambda _: None, text=False))
        while any(not s.tokens for s in answers):
            batching.step()
        if isinstance(gate, Gate):
            gate.is_open = True
        begin, made, steps = time.perf_counter(), sum(len(s.tokens) for s in answers), batching.metrics.steps
        while all(s.finish_reason is None for s in answers):
            batching.step()
        seconds, steps = time.perf_counter() - begin, batching.metrics.steps - steps
        made = sum(len(s.tokens) for s in answers) - made
        after = (sum(drafts.drafted), sum(drafts.accepted)) if drafts else (0, 0)
        while batching.step():
            pass
        if isinstance(gate, Gate):
            gate.is_open = False
        return Run(
            tokens_per_s=made / seconds,
            steps=steps,
            drafted=after[0] - before[0],
            accepted=after[1] - before[1],
            answers=answers,
        )


def measure(bench: Bench, variants: dict[str, tuple[Proposer, bool]], repeats: int) -> dict[str, Any]:
    """Of each variant, its proposer and whether drafts have a fixed length, beside plain decoding."""
    engines = {"plain": bench.batching(None, False)}
    engines |= {name: bench.batching(proposer, fixed) for name, (proposer, fixed) in variants.items()}
    recorded = bench.run(engines["plain"])
    for _, (proposer, _) in variants.items():
        if isinstance(proposer, ReplayProposer):
            proposer.record(recorded.answers)
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            run = bench.run(engine)
            if repeat:
                runs[name].append(run)
    plain = statistics.median(r.tokens_per_s for r in runs["plain"])
    return {name: summary(found, plain, recorded) for name, found in runs.items()}


def summary(runs: Sequence[Run], plain: float, recorded: Run) -> dict[str, Any]:
    speeds, last = [r.tokens_per_s for r in runs], runs[-1]
    pairs = list(zip(last.answers, recorded.answers, strict=True))
    found: dict[str, Any] = {
        "tokens_per_s": round(statistics.median(speeds), 1),
        "every_tokens_per_s": [round(s, 1) for s in speeds],
        "steps": last.steps,
        "answers_as_recorded": sum(a.tokens == b.tokens for a, b in pairs),
    }
    if last.drafted:
        found |= {"drafted": last.drafted, "accepted": last.accepted, "rate": round(last.accepted / last.drafted, 3)}
    return found | {"of_plain": round(statistics.median(speeds) / plain, 3)}


def probability(share: float, drafts: int) -> float:
    """That a drafted token is right, with which this share of the tokens of drafts is accepted."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle, drafts) < share * drafts else (low, middle)
    return high


def embeddings(engine: Engine) -> Tensor:
    """[vocab, hidden], the memory that the engine's calls read."""
    if isinstance(engine, EagerEngine):
        return engine.model.embed_tokens.weight
    if isinstance(engine, InductorEngine):
        return engine.weights["embed_tokens.weight"]
    raise JetExportError("--weights decisive: the engine's weights are not in memory that can be changed.")


@torch.no_grad()
def make_decisive(engine: Engine) -> int:
    """Multiplies the embeddings, until a token is followed by itself by a wide margin. -> the factor, a power of two,
    which is exact. Raises JetExportError where the output projection is not tied to them."""
    if not engine.config.tie_word_embeddings:
        raise JetExportError(
            "--weights decisive: the model's output projection is not its embeddings.", "--weights own"
        )
    weight = embeddings(engine)
    factor = 2 ** max(0, math.ceil(math.log2(DECISIVE / float(weight.float().square().mean().sqrt()))))
    weight.mul_(factor)
    return factor


def prepared(engine: Engine, manifest: Manifest, args: argparse.Namespace) -> str:
    """Changes the weights as the options ask; says what was done."""
    untrained = str(manifest.build.get("inputs", {}).get("weights", "")).startswith("random")
    chosen = args.weights or ("decisive" if untrained and not args.code else "own")
    if chosen == "own":
        return "the bundle's own"
    return f"decisive: the embeddings times {make_decisive(engine)}, so that answers repeat a token by a wide margin"


def prompts_of(
    args: argparse.Namespace, tokenizer: Tokenizer | ByteTokenizer, vocab: int, batch: int
) -> list[list[int]]:
    rng = random.Random(0)
    if not args.code:
        return [[rng.randrange(vocab) for _ in range(args.prompt)] for _ in range(batch)]
    texts = [tokenizer.encode(path.read_text(encoding="utf-8"))[: args.prompt] for path in args.code]
    return [texts[i % len(texts)] for i in range(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DEVICE/speculation-MODEL.json")
    parser.add_argument("--batch", default="1,8,64", help="sequences at once")
    parser.add_argument("--acceptance", default="0,0.6,0.8,0.9", help="share of drafted tokens that is accepted")
    parser.add_argument("--drafts", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--new", type=int, default=256, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--code", type=Path, nargs="+", help="text files to complete by lookup")
    parser.add_argument("--weights", choices=("decisive", "own"), help="default: decisive for random weights")
    args = parser.parse_args()
    engine, manifest = load_engine(args.bundle)
    weights = prepared(engine, manifest, args)
    print(f"weights: {weights}")
    tokenizer, vocab = load_tokenizer(args.bundle), engine.config.vocab_size
    rows = []
    for batch in map(int, args.batch.split(",")):
        prompts = prompts_of(args, tokenizer, vocab, batch)
        bench = Bench(
            engine=engine,
            tokenizer=tokenizer,
            prompts=prompts,
            new=args.new,
            temperature=args.temperature,
            drafts=args.drafts,
        )
        variants: dict[str, tuple[Proposer, bool]] = {}
        for rate in [] if args.code else map(float, args.acceptance.split(",")):
            for kind in ("fixed", "adaptive") if rate else ("adaptive",):
                proposer = ReplayProposer([], probability(rate, args.drafts), vocab)
                variants[f"{kind} {rate:g}"] = proposer, kind == "fixed"
        if args.code:
            variants = {"lookup": (LookupProposer(), False)}
        row = {"batch": batch, **measure(bench, variants, args.repeats)}
        rows.append(row)
        for name, found in row.items():
            if isinstance(found, dict):
                share = f", {found['rate']:.0%} of {found['drafted']} drafted tokens" if "rate" in found else ""
                print(
                    f"B{batch} {name}: {found['tokens_per_s']:.1f} tokens/s, {found['of_plain']:.2f} of plain{share}, "
                    f"{found['answers_as_recorded']} of {batch} answers as recorded"
                )
    name = str(manifest.model["name"])
    output = args.output or RESULTS / device_slug() / f"speculation-{name}.json"
    result = {
        "model": name,
        "precision": "fp8" if manifest.quantization else manifest.dtype,
        "limits": asdict(manifest.limits),
        "state_interval": manifest.state_interval,
        "weights": weights,
        "prompt": args.prompt,
        "new": args.new,
        "temperature": args.temperature,
        "drafts": args.drafts,
        "code": [path.name for path in args.code or ()],
        "rows": rows,
    }
    write_result(output, result)


if __name__ == "__main__":
    main()
