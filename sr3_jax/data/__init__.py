"""Data sources by name, batches by position, and the preparation of data sets."""
