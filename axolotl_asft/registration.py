"""Makes lm-evaluation-harness know our tasks by name, as `startup` asks; lm-eval has no entry point for that."""

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "evaluation" / "tasks"


def with_our_tasks(manager: Any) -> Any:
    """lm-eval's TaskManager, which looks into our folder beside its own: `lm_eval --tasks asft_safety`."""
    original = manager.initialize_tasks

    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or ())
        return original(self, [*paths, str(TASKS)], include_defaults)

    manager.initialize_tasks = initialize_tasks
    return manager
