"""lm-eval's tasks by name and from files: found, set up once before anything long, told apart when they change."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from axolotl_asft.errors import AsftError, one_line
from axolotl_asft.evaluation.models import files_state
from axolotl_asft.registration import TASKS


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what lm-eval cannot ask, before anything long is begun: the tasks are set up once, with their data.

    Raises:
        AsftError: no task, group or tag of that name, and no file; no data; or code or pictures, which are not for us.
    """
    if not tasks:
        return
    from lm_eval.evaluator_utils import get_task_list
    from lm_eval.tasks import get_task_dict

    manager = every_task()
    unknown = [task for task in tasks if task not in manager.all_tasks and not Path(task).is_file()]
    if unknown:
        raise AsftError(f"lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    try:
        found = get_task_list(get_task_dict([named(task, manager) for task in tasks], manager))
    except Exception as error:  # anybody's tasks: from the network over their packages to their YAML
        raise AsftError(
            f"lm-eval cannot set up {said_of(tasks, error)}; see the task's YAML and that its data can be downloaded, "
            "or leave it out"
        ) from error
    for task in found:
        if getattr(task.task, "UNSAFE_CODE", False):
            raise AsftError(
                f"the task {task.task_name} runs code that the model writes; run it with `lm_eval "
                "--confirm_run_unsafe_code` where that can do no harm, or leave it out"
            )
        if getattr(task.task, "MULTIMODAL", False):
            raise AsftError(f"the task {task.task_name} uses images or audio; expected a text-only task")


def task_state(task: str) -> str:
    """What tells that a task changed: lm-eval's version; of a file also its neighbours, which it may use, and its data.

    Those are the YAML and Python files of its folder, what it includes, and local files and folders of data.
    """
    from lm_eval.utils import load_yaml_config

    files: list[Path] = []
    content: dict[str, Any] = {}
    if (path := Path(task)).is_file():
        content = load_yaml_config(task, mode="simple")  # with what it includes
        files = [file for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml", ".py")]
        options = content.get("dataset_kwargs") or {}
        files += map(Path, _strings(options.get("data_files")))
        folders = map(Path, _strings([content.get("dataset_path"), options.get("data_dir")]))
        files += [file for folder in folders if folder.is_dir() for file in folder.rglob("*")]
    found = [version("lm_eval"), content, *files_state(files)]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]


def _strings(found: Any) -> list[str]:
    """All of them in lists and mappings."""
    if isinstance(found, str):
        return [found]
    items = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [text for item in items for text in _strings(item)]


def every_task() -> Any:
    """lm-eval's index of its tasks and ours, which would number those that it was asked for before."""
    manager = _index()
    manager.task_group_map.clear()
    return manager


@cache
def _index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), metadata={})  # seconds


def named(task: str, manager: Any) -> str:
    """The name of a task; that of a file is put into the index, which lm-eval asks about every task."""
    from lm_eval.utils import load_yaml_config

    if task in manager.all_tasks:
        return task
    content = load_yaml_config(task, mode="simple")
    if not isinstance(content, dict) or "task" not in content:
        raise ValueError("no `task:` in it")
    group = isinstance(content["task"], list)
    name = content["group" if group else "task"]
    kind = "group" if group else "python_task" if "class" in content else "task"
    manager.task_index[name] = {"type": kind, "task": -1, "yaml_path": task}
    manager.all_tasks.append(name)
    return name


def said_of(tasks: Sequence[str], error: Exception) -> str:
    return f"{', '.join(tasks)} ({type(error).__name__}: {one_line(error)})"
