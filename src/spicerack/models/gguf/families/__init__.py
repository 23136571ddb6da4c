"""Families that GGUF files hold, one file each, called as transformers calls them.

A file declares one constant, `FAMILY`: all names and numbers of the family under both names.
"""
