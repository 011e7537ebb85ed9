"""``python -m detoracle``: the command line."""

from __future__ import annotations

from detoracle.cli import main

if __name__ == "__main__":
    main()
