"""Image files: names, kinds, headers; opening, checking and re-encoding them with Pillow and TurboJPEG."""
