"""Decoding of untrusted images, in processes of their own."""
