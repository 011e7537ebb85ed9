"""``python -m detoracle.properties.laws`` prints the page on the laws."""

from __future__ import annotations

from detoracle.properties.laws.table import laws_page

if __name__ == "__main__":
    print(laws_page(), end="")
