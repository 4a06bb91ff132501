"""Pairs in, an aligned encoder out: the command `train`.

train.py          pairs -> run folder
settings.py       the training configuration, and when training ends
pairs.py          training pairs in memory: pixels, tokens, caption ids
trainer.py        the training loop: validation, logging, saving
learner.py        one step: augment, encode, loss, gradients, optimizer, average
objective.py      the loss of a batch
token_prediction.py   a second objective: the tokens of an image's captions
optimization.py   learning rate, weight averages, the fastest arithmetic of a machine
resume.py         the saved training state, and whether a run may continue from it
leakage.py        validation samples that are also in the training data
interrupts.py     Ctrl-C and SIGTERM between two steps
runlog.py         metrics.jsonl and TensorBoard
"""
