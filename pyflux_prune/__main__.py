"""``python -m pyflux_prune`` is ``pyflux-prune``."""

from .cli import main

main()
