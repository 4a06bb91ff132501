"""Answers from a store: the commands `index` and `search`.

build.py      store -> index, its recall by row measured on held-out queries
searcher.py   query -> hits
sheet.py      hits as an image
"""
