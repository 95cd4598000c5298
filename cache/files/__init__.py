"""files: how files are written, linked, recognized and removed, whatever they hold.

``atomic`` writes a whole file or none, ``begun`` removes what a killed process began, ``space``
asks whether there is room, ``link`` shares bytes between names, ``stamp`` tells a changed file,
``trash`` removes, ``durable`` waits until the disk has it. Imports ``cache.errors`` alone.
"""
