"""Measure how good a model is: the command `evaluate`.

evaluate.py   pairs -> recall@k, zero-shot accuracy
metrics.py    NumPy in, numbers out
"""
