"""remote: a store that several machines share, read through and written behind.

``connect`` chooses the ``transport`` for an ``address``, with ``credentials`` from the environment;
what goes wrong is one of its ``faults``. ``retrying`` puts patience above it; ``remote`` checks
blobs by their ``content``, and records by ``signing``. ``sharing`` moves a cache's actions and
blobs. Imports blobs, records and what they import; never ``store``.
"""
