"""Held-out figures of a registered model.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/evaluate.py model=models:/demo-stage1@candidate data=s3://bucket/heldout

The words are those of `isthmus evaluate`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
