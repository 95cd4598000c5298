"""terminal: what people see of a run: ``reporter`` says it, ``progress`` counts, ``live`` draws.

It is told of tasks by doit and of their outcomes by the build log, and changes nothing.
"""
