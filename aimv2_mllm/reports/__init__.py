"""Finished work for people to look at: plain data for the templates, and pictures as PNG files."""
