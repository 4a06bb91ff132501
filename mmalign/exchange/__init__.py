"""Files of other programs: the verbs `export` and `import`.

transfer.py   a store into parquet, npy, datasets; embeddings of clip-retrieval into a store
"""
