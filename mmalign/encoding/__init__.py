"""Many items into vectors at full speed: decoding and encoding overlap, batches fit the memory.

modality_encoder.py   what encodes the items of one modality
modalities.py         the modalities of a model; where more are registered
images.py             images, decoded on the CPU or on the device
batches.py            each text once, batches split in halves if memory runs out
pipeline.py           records -> decode -> encode -> results, several at a time
items.py              a list of items, as a caller gives it
"""
