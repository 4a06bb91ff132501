"""Exchange files with other programs: the commands `export` and `import`.

transfer.py   a store to parquet, npy, datasets; embeddings of clip-retrieval to a store
"""
