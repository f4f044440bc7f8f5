"""The page of `sr3 web`: upscale images in a browser, and look at a training run and an evaluation.

`jobs`      requests on the device: the file pipeline of `sr3 upscale`, with progress, stopped within a step
`views`     what the page shows of outputs: thumbnails, crops at 100 %, the spread of samples; and its HTML
`page`      the tab that upscales, and its endpoint for programs
`monitor`   the tabs of a training run and of an evaluation
`server`    the HTTP server: private files, limits, headers, authentication
"""
