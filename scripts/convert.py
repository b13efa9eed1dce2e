"""Convert a folder of images, or another source, to a store: the same as ``dali-lmdb convert``."""

from dali_lmdb.convert.__main__ import main

if __name__ == "__main__":
    main()
