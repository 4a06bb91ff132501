"""The command `mmalign`: parse, call one function, print.

main.py      the commands that go from pairs to hits
store.py     the commands that look after a store
info.py      what a store holds, in ten lines
demo.py      all verbs, on scenes it draws itself
options.py   what commands share
errors.py    how a command ends: one line for a mistake, exit codes
"""
