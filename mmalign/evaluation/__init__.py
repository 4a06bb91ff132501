"""How good a model is: the verb `evaluate`.

evaluate.py   pairs -> recall@k, zero-shot accuracy
metrics.py    NumPy in, numbers out
"""
