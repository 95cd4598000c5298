"""remote: a store that several machines share, read through and written behind.

``connect`` chooses the ``transport`` for a URL, with ``credentials`` from the environment;
``remote`` puts patience and checks above it, ``signing`` vouches for records, ``sharing`` moves a
cache's actions and blobs. Imports blobs, records and what they import; never ``store``.
"""
