"""Methods compared at equal data and equal compute, with a report (``branchmix study``, ``branchmix report``).

``settings`` (the YAML file), ``methods`` (what can be compared), ``graph`` (steps with their budgets and content keys),
``run`` (all steps that are not done), ``step`` (one of them, in a process of its own), ``measure`` and ``inference``
(what a model is worth and what it costs), ``statistics``, ``report`` and its ``tables``, ``figures`` and ``page``.
"""
