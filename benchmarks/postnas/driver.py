"""Call: one call of shown.py, from what the last one left to what the next one needs."""

from __future__ import annotations

import argparse
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ground_truth import correlations, learned_and_uniform
from models import ALL, compare_models, engine
from plan import CALL, SIDE_BY_SIDE, Piece, plan, ratios, smallest
from prepare import prepare
from scale import Scale, recipes
from state import Progress, pack, unpack
from table import tables
from teacher import train_stage
from trainings import trainings

from jet_export.postnas.parallel import Workers
from jet_export.postnas.run import results_of, run_step
from jet_export.postnas.session import Session, Stopped
from jet_export.training.distributed import processes
from jet_export.training.stop import Stop, stop_at_signals
from jet_export.utils.environment import environment
from jet_export.utils.errors import JetExportError
from jet_export.utils.files import write_atomically

SAVING = 25.0  # seconds before the end of a call at which training stops: a checkpoint, and the state is packed


@dataclass
class TimedSession(Session):
    """Stops before a training that would not end in time."""

    until: float = 0.0  # of time.monotonic()
    unit: float = 0.0  # seconds that the next training should take

    def check_stop(self) -> None:
        if time.monotonic() + self.unit > self.until:
            raise Stopped
        super().check_stop()


class Call:
    def __init__(self, args: argparse.Namespace, until: float) -> None:
        """`until`: when this process should have ended, of time.monotonic()."""
        self.args, self.output = args, args.output
        self.scale: Scale = recipes(args.output, args.toy, args.eager)
        self.until = until - min(SAVING, 6 * args.minutes)
        self.pieces = plan(self.scale.postnas, self.scale.teacher, self.scale.layers, args.seeds)
        self.progress = Progress()
        skipped, only = set(args.skip.split(",")), set(filter(None, args.only.split(",")))
        self.wanted = [p for p in self.pieces if p.name not in skipped and (not only or p.name in only)]

    def run(self) -> int:
        """The status that the process ends with: 1 if a piece failed."""
        if not self.args.plan:
            if self.args.state and unpack(self.args.state, self.output):
                print(f"state: taken from {self.args.state}")
            self.progress = Progress.read(self.output)
        self.show_plan()
        if self.args.plan:
            return 0
        self.progress.calls += 1
        self.progress.errors.clear()
        began = time.monotonic()
        self._prepare()
        several = Workers(self.args.parallel)
        with processes(self.args.device) as group, stop_at_signals() as stop, closing(several):
            timer = threading.Timer(max(0.0, self.until - time.monotonic()), setattr, (stop, "asked", True))
            timer.daemon = True
            timer.start()
            run = self.output / "run"
            self.session = TimedSession(
                self.scale.postnas, group, run, run, self.args.device, stop, partial(print, flush=True),
                workers=several if self.args.parallel > 1 else None, until=self.until,
            )  # fmt: skip
            self._pieces(stop)
            timer.cancel()
        self._end(round(time.monotonic() - began))
        print(f"call {self.progress.calls}: {time.monotonic() - began:.0f} s")
        return 1 if self.progress.errors else 0

    def _prepare(self) -> None:
        data = self.output / "data"
        if not (data / "heldout-code.jsonl").exists():
            prepare(data, self.args.corpus, self.args.rows, 24 if self.args.toy else None, print)

    def _pieces(self, stop: Stop) -> None:
        progress = self.progress
        for piece in self.wanted:
            if piece.name in progress.done or not set(piece.needs) <= set(progress.done):
                continue
            longer = ratios(self.pieces, progress.seconds, progress.done)(piece)
            seen = any(p.phase in SIDE_BY_SIDE and p.name in progress.done for p in self.pieces)
            unit, left = smallest(piece, longer, self.args.parallel, seen), self.until - time.monotonic()
            if stop.asked or unit > left:
                print(f"{piece.name}: not begun: {unit:.0f} s at least, {left:.0f} s left")
                continue
            print(f"{piece.name}: {piece.what}; about {piece.seconds * longer:.0f} s", flush=True)
            self.session.unit = unit if piece.phase in SIDE_BY_SIDE else 0.0
            with self._timed(piece):
                result = self._work(piece.name)()
                values = {"name": piece.name, "assumed_seconds": piece.seconds, "result": result}
                write_atomically(self.output / f"pieces/{piece.name}.json", json.dumps(values, indent=1) + "\n")
                progress.done.append(piece.name)

    @contextmanager
    def _timed(self, piece: Piece) -> Iterator[None]:
        """Keeps what happens to a piece. What a broken GPU raises ends the call."""
        began = time.monotonic()
        try:
            yield
        except Stopped:
            print(f"{piece.name}: stopped; the next call goes on")
        except (JetExportError, RuntimeError, OSError, AssertionError, TypeError, ValueError, LookupError) as e:
            self.progress.errors[piece.name] = f"{type(e).__name__}: {e}"
            print("".join(traceback.format_exception(e)) + f"{piece.name}: failed")
        finally:
            name = piece.name
            self.progress.seconds[name] = self.progress.seconds.get(name, 0.0) + time.monotonic() - began
            self.progress.write(self.output)

    def _work(self, name: str) -> Callable[[], Any]:
        """What the piece of this name does; its result is JSON."""
        session, run, scale = self.session, self.output / "run", self.scale
        stage, _, number = name.partition("-")
        if stage == "teacher":
            train = partial(train_stage, session, scale.teacher, scale.config, int(number) - 1, self.output)
            return lambda: {"tokens": train().tokens}
        if name in ("truth", "compare"):
            session.directory = self.output / "truth"
            return partial(correlations, session, run) if name == "truth" else self._compare
        if name == "models":
            return partial(compare_models, session, self.output, scale.items or ALL)
        if name == "engine":
            return lambda: engine(session, self.output, self.until - time.monotonic(), scale.limits)
        return lambda: {"did": run_step(session, name), **results_of(run)[name]}

    def _compare(self) -> list[dict[str, Any]]:
        return learned_and_uniform(self.session, self.args.seeds)

    def _end(self, seconds: int) -> None:
        """Results, the report, and the state of the next call. `seconds`: of this one."""
        machine = environment()
        call = {"seconds": seconds, "commit": machine["commit"], "parallel": self.args.parallel}
        self.progress.history.append(call)
        self.progress.write(self.output)
        paths = (self.output / f"pieces/{p.name}.json" for p in self.pieces)
        found = {p.stem: json.loads(p.read_text(encoding="utf-8"))["result"] for p in paths if p.exists()}
        values = {
            "environment": machine,
            "progress": vars(self.progress),
            "toy": self.args.toy,
            "pieces": found,
            "trainings": trainings(self.output),
        }
        write_atomically(self.output / "shown.json", json.dumps(values, indent=1) + "\n")
        text = tables(found, vars(self.progress), self.pieces)
        write_atomically(self.output / "shown.md", text)
        print(text)
        self._report()
        pack(self.output, self.args.save or self.output / "state", print)
        left = [p.name for p in self.pieces if p.name not in self.progress.done]
        print(f"not done: {', '.join(left)}: run the same command again" if left else f"done: {self.output}/shown.md")
        if left:
            self.show_left()

    def _report(self) -> None:
        """The steps' HTML report, where plotly is installed."""
        try:
            from jet_export.postnas.report import report

            if found := results_of(self.output / "run"):
                write_atomically(self.output / "report.html", report(found, environment()))
        except (ImportError, JetExportError) as e:
            print(f"report.html: not written ({str(e).splitlines()[0]})")

    def show_plan(self) -> None:
        for p in self.pieces:
            state = f"done in {self.progress.seconds[p.name]:.0f} s" if p.name in self.progress.done else "to do"
            print(f"{p.name:<10} {p.seconds / 60:5.1f} min assumed, parts of {p.unit:3.0f} s  {state:<14} {p.what}")
        print(f"{'all':<10} {sum(p.seconds for p in self.pieces) / 60:5.1f} min assumed")
        self.show_left()

    def show_left(self) -> None:
        """What is left, at the speeds that were seen."""
        longer = ratios(self.pieces, self.progress.seconds, self.progress.done)
        left = [p.seconds * longer(p) for p in self.pieces if p.name not in self.progress.done]
        calls = -(-sum(left) // max(1.0, 60 * self.args.minutes - SAVING - CALL))
        work, around = sum(left) / 60, calls * (CALL + SAVING) / 60
        print(
            f"left: {work:.1f} min of work, {work + around:.1f} with starts and ends of {calls:.0f} calls of "
            f"{self.args.minutes:g} min; used: {sum(self.progress.seconds.values()) / 60:.1f} min of work"
        )
