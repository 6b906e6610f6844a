"""Other methods on the same trainer: each file has only what differs from `oisd.py`."""
