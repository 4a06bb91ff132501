"""Images and captions into a store: the verb `embed`.

embed.py     sources and a model -> rows of a store
changes.py   what a store lacks of its sources
stored.py    the rows of a store, found by place and by content
"""
