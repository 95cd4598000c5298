"""planning: decides what is to be done, and moves no tensor.

``plan`` makes a ``node`` of each layer of a target's stages, or the target is ``refused``.
``bundle`` says what build/TARGET will hold, with its ``model_card``, ``sizes`` how many bytes move,
``forecast`` in ``steps`` what a run would do. ``lockfile`` has what models.lock (``lock_format``)
says, of each ``source_record``; ``locked_sources`` and ``locked_targets`` hold builds against it.
May import stages and all below; execution carries out what is decided here.
"""
