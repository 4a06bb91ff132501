"""Pairs in, an aligned encoder out: the verb `train`.

train.py          pairs -> run folder
settings.py       how to train: the configuration, and where a training ends
pairs.py          training pairs in memory: pixels, tokens, groups
trainer.py        the training loop: validation, logging, saving
learner.py        one step: augment, encode, loss, gradients, optimizer, average
objective.py      the loss of a batch
token_prediction.py   a second objective: the tokens of an image's captions
optimization.py   learning rate, averages, the fastest arithmetic of a machine
resume.py         what a stopped training goes on from, and whether it may
leakage.py        validation samples that are trained on too
interrupts.py     Ctrl-C and SIGTERM between two steps
runlog.py         metrics.jsonl and TensorBoard
"""
