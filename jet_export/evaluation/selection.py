"""Which tasks `--tasks` names: local ones, lm-evaluation-harness's, and those of directories of YAML files."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jet_export.evaluation.tasks.settings import TaskSettings
from jet_export.utils.errors import JetExportError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

LOCAL = Path(__file__).parent / "tasks"
SEED = 1234  # of few-shot examples, the harness's default
INSTALL = "pip install 'jet-export[eval]'"


def quiet_harness() -> None:
    """Import the harness without its progress bars and remarks; ours are progress.py's.

    Raises JetExportError where it is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as e:
        raise JetExportError(f"eval needs lm-evaluation-harness ({e}).", f"{INSTALL}.") from None


def load_tasks(
    names: Sequence[str], settings: TaskSettings, emit: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The harness's tasks and groups, loaded: {"tasks": {name: Task}, "groups": {name: Group}}.

    A name that is a directory stands for all tasks in it. Raises JetExportError for a name that nobody has, and for
    documents that cannot be had."""
    directories = [Path(n) for n in names if Path(n).is_dir()]
    manager, wanted = _manager(directories, settings, defaults=False), []
    for name in names:
        wanted += _tasks_in(Path(name), settings) if Path(name) in directories else [name]
    if not wanted:
        raise JetExportError("--tasks: which?", f"Local tasks: {', '.join(local_tasks(settings))}.")
    if any(name not in manager.all_tasks for name in wanted):
        emit("  reading lm-evaluation-harness's list of tasks ...")
        manager = _manager(directories, settings, defaults=True)
        _check_names(wanted, manager.all_tasks, local_tasks(settings))
    try:
        loaded: dict[str, Any] = dict(manager.load(wanted))
    except JetExportError:
        raise
    except Exception as e:  # whatever a task's code or a download raises
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise JetExportError(
            f"--tasks {','.join(wanted)}: could not be loaded ({type(e).__name__}: {reason}).",
            "A task of the harness downloads its data set: HF_HUB_OFFLINE=1 uses what has been downloaded before.",
        ) from e
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def local_tasks(settings: TaskSettings) -> list[str]:
    return list(_manager([], settings, defaults=False).all_tasks)


def _manager(directories: list[Path], settings: TaskSettings, *, defaults: bool) -> TaskManager:
    """`defaults`: with the harness's own tasks, which takes it many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=[str(p) for p in (LOCAL, *directories)], include_defaults=defaults, metadata=settings.metadata()
    )


def _tasks_in(directory: Path, settings: TaskSettings) -> list[str]:
    from lm_eval.tasks import TaskManager

    found = list(TaskManager(include_path=str(directory), include_defaults=False).all_subtasks)
    if not found:
        raise JetExportError(f"--tasks {directory}: no task in it.", "Tasks are YAML files with a key `task`.")
    return found


def _check_names(wanted: list[str], known: list[str], local: list[str]) -> None:
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            meant = f"Did you mean {' or '.join(near)}? " if near else ""
            raise JetExportError(
                f"--tasks {name}: no such task.",
                f"{meant}Local tasks: {', '.join(local)}; others are lm-evaluation-harness's, or a directory's of YAML "
                "files.",
            )
