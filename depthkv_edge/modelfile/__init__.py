"""Model files: the packaged ones, their metadata, the keys of a calibration, and writing them."""
