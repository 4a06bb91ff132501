"""Answers from a store: the commands `index` and `search`.

build.py      store -> index, its recall by row measured on held-out queries
calibrate.py  store -> how relevance is read from scores, its errors measured
grammar.py    the query language: text -> reading, and back
query.py      what can be asked, as a value
filters.py    filters of a query -> SQL
exclusion.py  which rows a query leaves out
searcher.py   query -> hits
answers.py    encoded queries -> hits of one generation of a store
searched.py   one store or several, searched together
candidates.py rows that may be hits, of all stores in one order
feedback.py   a query turned by examples
diversity.py  hits that are unlike each other
duplicates.py near-duplicates as one hit
words.py      text -> the words it is found by
lexical.py    rows by words of their captions
fusion.py     rankings by vectors and words -> one
several.py    several stores of one space -> hits
relevance.py  scores -> relevance of each hit, and whether anything was found
phrases.py    short phrases, and which of them captions name
sheet.py      hits as an image
"""
