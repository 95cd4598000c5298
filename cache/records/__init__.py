"""records: the small files that say what was made: manifests, the action cache, memos.

Every record can tell that it is whole; one that is not is as good as absent. Imports
``cache.errors``, ``cache.digest`` and ``cache.files``.
"""
