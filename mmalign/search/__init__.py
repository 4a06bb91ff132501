"""Answers from a store: the commands `index` and `search`.

build.py      store -> index, its recall by row measured on held-out queries
grammar.py    the query language: text -> reading, and back
query.py      what can be asked, as a value
filters.py    filters of a query -> SQL
exclusion.py  which rows a query leaves out
searcher.py   query -> hits
sheet.py      hits as an image
"""
