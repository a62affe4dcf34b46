"""From a table of results to verdicts: better, worse, U-shaped, inverted-U, flat or undecided with scale, and how sure.

``table`` and ``examples`` read, ``fit`` estimates errors, ``order`` tests, ``forms`` describes, ``verdict`` decides,
``multiple`` compares series, ``report`` is the whole: ``report.trends(path)``. Neither torch nor transformers is
imported here.
"""
