"""A server for tests: imports axolotl once, then runs each config it is given in a forked process of its own.

It reads one JSON line a run, {"config": path, "environment": {...}}, and answers one, {"exit": status, "output": text}.
The child does what `python -m axolotl.cli.train config` does, which is what `accelerate launch` starts.
"""

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    import axolotl.cli.config
    import axolotl.cli.train
    import axolotl.loaders
    import axolotl.train  # noqa: F401
    import bitsandbytes  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            child = os.fork()
            if child == 0:
                os.environ.update(wanted["environment"])
                _run(wanted["config"], output)
            _, status = os.waitpid(child, 0)
            text = output.read_text(errors="replace")
        print(json.dumps({"exit": os.waitstatus_to_exitcode(status), "output": text}), file=answers, flush=True)


def _run(config: str, output: Path) -> None:
    import axolotl.cli.train

    log = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(Path(config).parent)
    sys.argv = ["axolotl.cli.train", config]
    status = 0
    try:
        axolotl.cli.train.do_cli(config)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
