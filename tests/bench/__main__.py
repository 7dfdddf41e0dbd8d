"""Entry point of `python -m tests.bench`."""

from tests.bench.table import main

main()
