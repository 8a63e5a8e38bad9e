"""Rows in files that somebody else wrote, each read by its number: JSON, tar shards local
and remote, tables, data sets of the library `datasets`."""
