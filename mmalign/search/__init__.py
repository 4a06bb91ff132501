"""Answers from a store: the commands `index` and `search`.

build.py      store -> index, its recall by row measured on held-out queries
calibrate.py  store -> how relevance is read from scores, its errors measured
searcher.py   query -> hits
relevance.py  scores -> relevance of each hit, and whether anything was found
phrases.py    phrases that stand in for captions where a store has none
sheet.py      hits as an image
"""
