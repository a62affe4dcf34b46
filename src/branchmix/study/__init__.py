"""Methods compared at equal data and equal compute, with a report (``branchmix study``, ``branchmix report``).

``settings`` (the YAML file), ``methods`` (what can be compared), ``graph`` and ``build`` (steps with their budgets and
content keys), ``facts`` (sizes and FLOPs), ``forecast`` (what it will take),
``run`` (all steps that are not done), ``step`` (one of them, in a process of its own), ``measure`` and ``inference``
(what a model is worth and what it costs), ``statistics``, ``report`` and its ``tables``, ``figures`` and ``page``.
"""
