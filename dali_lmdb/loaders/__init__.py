"""Iterables of (images, labels) over a store: through DALI, or the classic CPU path."""
