"""Which expert each token uses: ``branchmix routes``, its numbers, pictures and page."""
