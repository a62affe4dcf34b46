"""From a table of results to verdicts: better, worse, U-shaped, inverted-U, flat or undecided with scale, and how sure.

``table`` and ``series`` read, ``fit`` estimates errors, ``order`` tests and describes, ``verdict`` decides, and
``judge`` does it all and compares: ``judge.trends_by_axis(path)``. ``overview`` orders the result for ``plots`` and
``html_page``, ``sentences`` puts it into words. Neither torch nor transformers is imported here.
"""
