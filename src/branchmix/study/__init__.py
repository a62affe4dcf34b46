"""Methods compared at equal data and equal compute, with a report (``branchmix study``, ``branchmix report``).

Read in this order: ``settings`` (the YAML file, and what can be compared), ``models`` (what methods merge into),
``graph`` and ``build`` (steps with budgets and keys), ``scheduler`` (runs what is not done), ``step`` (one step, in a
process of its own), ``results`` and ``comparisons`` (numbers from what steps left), ``tables`` and ``report``.
``forecast`` says what a study takes. ``recipes/demo.yaml`` is the demo.
"""
