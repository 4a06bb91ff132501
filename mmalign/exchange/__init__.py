"""Exchange files with other programs: the commands `export` and `import`.

export.py    rows of a store to files of other programs
imports.py   vectors made by clip-retrieval to a store
layouts.py   rows as parquet, and as a Hugging Face dataset
parts.py     clip-retrieval's layout, out and in
"""
