"""The steps of ``gpu_report.py``: generators of rows, each run in a process of its own (``isolated``)."""
