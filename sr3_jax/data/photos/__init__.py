"""The default data set: real photographs with free licences (ATTRIBUTION.md), and its TFDS builder."""
