"""cli: the command line, which is doit's with this project's tasks and commands.

``loader`` opens a ``session`` on one models.toml and hands it down: ``task_graph``,
``report_tasks``, ``publish_tasks`` and ``verify_tasks`` make doit's tasks of its plans,
``refused_tasks`` those of targets without one; ``schedule`` puts them in order where layers are
fetched, ``run`` runs them, ``commands`` tell of them and
look after what they leave, ``terminal`` shows them at work. What is taken from doit beyond its
documented interface stands in ``doit_adapter``. This is the top: it may import every room, and no
room imports it.
"""
