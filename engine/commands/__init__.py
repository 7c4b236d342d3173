"""The commands of `plexrank`, one file each: parse, call one function of the engine, print.

Modules here import the engine inside their functions, so that `plexrank --help` answers at once.
"""
