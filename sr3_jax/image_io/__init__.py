"""Users' image files in and out; no other package opens them.

`image_file`: `read_image`, `read_rgb`, `read_size`, `write_image`, and `DecodedImage`, an image with its metadata.
`inputs`: `find_images`, which pairs input files with output files. `grid`: `image_grid`, titled grids to look at.
`errors`: `reason` and `printable`, for messages. `pixels` and `metadata` are internal.
"""
