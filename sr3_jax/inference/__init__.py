"""Inference with trained models.

`loading` and `model`: `load` and `Model`, also available as `sr3_jax.load` and `sr3_jax.Model`. `upscale_files`: files
and folders. `cascade` and `stages`: a base model followed by super-resolution models. `sampling_file`: the sampling
settings stored next to a model. `contact_sheet`: generated images as one PNG. Internal: `upscaling` (arrays of any
size), `batching` (streams of images), `tiling` and `program` (the jitted sampling program).
"""
