"""Images and captions into a store: the command `embed`.

embed.py     sources and a model -> rows of a store
work.py      slices of a scan that can be encoded anywhere, and receipts of what was written
changes.py   what is missing in a store compared with its sources
stored.py    the rows of a store, found by location and by content
rebuild.py   the rows of a store embedded with another model
"""
