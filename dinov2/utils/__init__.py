"""Functions that several packages use: configuration, seeds, files, precision, memory, processes, ends of commands.

They import only `configs` and `distributed`.
"""
