"""Every architecture of transformers that can be made small.

Saved, loaded in a clean process, compared bit for bit.
"""
