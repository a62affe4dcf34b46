"""``python -m branchmix`` is the ``branchmix`` command."""

from branchmix.cli import main

main()
