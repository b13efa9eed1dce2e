"""Evaluation of a checkpoint on a store: ``dali-lmdb evaluate``.

``settings`` joins the checkpoint's settings with the command's, ``rank`` evaluates on one rank, ``results`` holds
what the ranks have predicted together, and ``outputs`` writes it to files.
"""
