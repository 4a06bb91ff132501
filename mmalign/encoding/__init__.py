"""Many items into vectors at full speed: decoding and encoding overlap, batches fit the memory.

batches.py    each text once, batches split in halves if memory runs out
pipeline.py   records -> decode -> encode -> results, several at a time
"""
