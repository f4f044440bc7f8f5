"""The default data set: photographs under free licenses (ATTRIBUTION.md), and its TFDS builder."""
