"""maintenance: looks after a whole cache folder: what is there, what is wrong, what may go.

``survey`` takes the inventory, ``verify`` reads all of it, ``gc`` chooses what to remove. Imports
blobs, records and files; knows neither remotes nor who uses the cache.
"""
