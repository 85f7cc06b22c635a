"""Every architecture of transformers that can be made small: saved, loaded in a clean process, compared bit for bit."""
