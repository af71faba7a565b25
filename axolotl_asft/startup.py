"""Runs at every start of Python, so it imports the standard library alone and does next to nothing.

Why it is needed: axolotl resolves plugin names in the launching process and again in every child that accelerate
or torchrun starts, by splitting them at a dot; `plugins: [asft]` has no dot. There is no registry of short names to
join, and no entry point that the children load. A `.pth` file (from Python 3.15 on a `.start` file, PEP 829) is the
one place that every interpreter of the environment passes; it calls `install`, which waits for four modules of
axolotl to be imported and then wraps one name in each (see `guard`), and for lm-eval's, so that it knows our tasks
(see `registration`). An interpreter that never imports either pays for one dictionary look-up an import.
"""

import sys

_WRAPPERS = {
    "axolotl.integrations.base": ("load_plugin", "guard", "wrap_load_plugin"),
    "axolotl.utils.config": ("validate_config", "guard", "wrap_validate_config"),
    "axolotl.cli.art": ("print_axolotl_text_art", "guard", "wrap_print_logo"),
    "axolotl.cli.config_options": ("AXOLOTL_CONFIG_CLI_OPTIONS", "guard", "add_options"),
    "lm_eval.tasks": ("TaskManager", "registration", "with_our_tasks"),
}


class _Finder:
    """A meta-path finder that steps aside for the real ones and adds a step after the module has run, once."""

    def __init__(self):
        self.waiting = dict(_WRAPPERS)

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        others = (getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not self)
        found = (find_spec(fullname, path, target) for find_spec in others if find_spec is not None)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if fullname not in self.waiting:
                return
            from importlib import import_module

            from axolotl_asft.guard import print_user_errors_in_one_line

            name, home, wrapper = self.waiting[fullname]
            wrap = getattr(import_module(f"axolotl_asft.{home}"), wrapper)
            setattr(module, name, wrap(getattr(module, name)))
            print_user_errors_in_one_line()
            del self.waiting[fullname]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def is_installed():
    """Whether the finder is on the meta path."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install():
    """Put the finder first on the meta path, once."""
    if is_installed():
        return
    sys.meta_path.insert(0, _Finder())
