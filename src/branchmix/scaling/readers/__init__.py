"""Results of other harnesses as a table for ``branchmix scaling trends --from``: no csv is written."""
