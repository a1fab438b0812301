"""Runs scripts of this folder one after the other in one process: python benchmarks/several.py FILE

Every line of FILE is a script and its options, as for a shell. The model, its texts and what is
quantized are made once. A script that fails does not keep the others from running.
"""

from __future__ import annotations

import importlib
import shlex
import sys
import traceback
from pathlib import Path


def main() -> None:
    failed = 0
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        script, *options = shlex.split(line)
        sys.argv[:] = [script, *options]
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except (Exception, SystemExit):
            traceback.print_exc()
            failed += 1
    if failed:
        sys.exit(f"{failed} of the scripts failed, see above")


if __name__ == "__main__":
    main()
