"""``python -m dali_lmdb``: the same as ``dali-lmdb``."""

from dali_lmdb.cli import main

if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb")
