"""Methods compared at equal data and equal compute, with a report (``branchmix study``, ``branchmix report``).

``settings`` (the YAML file), ``methods`` (what can be compared), ``graph`` and ``build`` (steps with their budgets and
content keys), ``facts`` (sizes and FLOPs), ``forecast`` and ``speed`` (what it will take, and budgets for a time),
``processes`` (how steps share the machine), ``run`` (all steps that are not done), ``step`` (one of them, in a process
of its own), ``measure`` and ``inference`` (what a model is worth and what it costs), ``results``, ``comparisons`` and
``statistics`` (numbers), ``report`` with its ``tables``, ``figures`` and templates. ``recipes/demo.yaml`` is the demo.
"""
