"""Images and captions into a store: the verb `embed`.

embed.py   sources and a model -> rows of a store
todo.py    what a store lacks of its sources
held.py    what a store holds, found by place and by content
"""
