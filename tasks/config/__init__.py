"""models.toml: what it may say, reading it, and telling every mistake with its line and its mend.

``tables`` declares the file's tables (the keys of a model are ``tasks.core.spec``'s, which lower
rooms need); ``reader`` reads a file into targets; ``values`` reads a single value; ``mistakes``
says what is wrong, and ``lines`` where; ``keys`` describes the keys as they are declared, for
messages, for the JSON Schema and for the reference page, which ``python -m tasks.config.schema``
writes. So a new key is one field. The words that a key takes come from the registries of loaders,
layouts and stages, and the numbers from MLX.

May import ``tasks.core`` and, for what they know to be valid alone, ``tasks.tensors``,
``tasks.checkpoints``, ``tasks.layouts`` and ``tasks.stages``.
"""
