"""Methods compared at equal data and equal compute, with a report (``branchmix study``, ``branchmix report``).

Read in this order: ``settings`` (the YAML file), ``methods`` (what can be compared), ``graph`` and ``build`` (steps
with budgets and keys), ``scheduler`` (runs what is not done), ``step`` (one step, in a process of its own), ``results``
(numbers from what steps left) and ``report``. ``forecast`` says what a study takes. ``recipes/demo.yaml`` is the demo.
"""
