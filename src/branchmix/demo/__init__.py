"""The whole story on text that is installed anyway: seed, experts, mixtures, one page (``branchmix demo``).

``calibrate`` (what this machine can do in the time), ``settings`` (the YAML files), ``story`` (the commands, in their
order), ``measure`` (every model on every domain), ``plots`` and ``page`` (what is shown). The text is that of
``branchmix.data.installed``.
"""
