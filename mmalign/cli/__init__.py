"""The command `mmalign`: parse, call one function, print.

main.py      the commands that go from pairs to hits
store.py     the commands that maintain a store
info.py      a summary of a store in ten lines
demo.py      all commands, on generated scenes
options.py   options shared by commands
errors.py    how a command ends: one line for a mistake, exit codes
"""
