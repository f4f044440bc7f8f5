"""Networks in Flax Linen; no other package imports `flax.linen`.

`unet.UNet`: the denoiser. `blocks`: its layers. `classifier`: a small classifier.
"""
