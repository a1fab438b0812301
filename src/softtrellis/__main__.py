"""Run the command line as ``python -m softtrellis``."""

from softtrellis.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
