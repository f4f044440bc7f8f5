"""Plan a training job on a topology: does it fit, and what to change if it does not."""
