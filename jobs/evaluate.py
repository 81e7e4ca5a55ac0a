"""Held-out figures of a registered model.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/evaluate.py model=models:/demo-stage1@candidate data=s3://bucket/heldout workers=4 \\
        out=s3://bucket/figures

With ``workers`` the encoding and generating is done by Ray actors, ``gpus_per_worker`` each; the figures are the same
for any number of them. The words are those of `isthmus evaluate`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
