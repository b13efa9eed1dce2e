"""Records as the loaders deliver them: ``dali-lmdb preview`` and ``dali-lmdb parity``.

``delivery`` gets records through a loader, ``records`` chooses them, ``preview`` draws them, and ``parity``
compares those of two loaders.
"""
