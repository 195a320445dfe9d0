"""`ray job submit --working-dir . -- python train.py ...`: the same arguments as `ray-ctrl train`."""

import sys

from ray_ctrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
