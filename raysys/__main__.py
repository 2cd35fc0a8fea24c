"""``python -m raysys VERB key=value ...``: the entrypoint for ``ray job submit``."""

from raysys.cli import main

main()
