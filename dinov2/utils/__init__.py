"""Functions that several packages use: configuration, files, numerics, resources, run status, ends of commands.

They import only `configs` and `distributed`.
"""
