"""commands: one module a command of the command line, except ``run``, which is doit's default.

A new command is a module here, with a class that derives from ``Command``, and its line in
pyproject.toml under ``[tool.doit.plugins.command]``: doit, ``help`` and docs/cli.md (``manual``)
read it there. ``forecasting`` is what the commands share that tell of a run.
"""
