"""Networks in Flax Linen; no other package imports `flax.linen`.

`unet.UNet`: the denoiser. `blocks`: its layers. `classifier`: a small classifier. `adm_unet.AdmUNet` and
`sr3_port_unet.Sr3PortUNet`: denoisers whose weights others have published. `ddpm_blocks`: their layers.
"""
