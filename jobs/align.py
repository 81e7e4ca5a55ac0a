"""Which image encoder goes with which text encoder: CKA over a sample of a data set.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/align.py select pipelines/projector/select.yaml data=s3://bucket/pairs \\
        out=s3://bucket/select actors=8

The words are those of `isthmus align`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["align", *sys.argv[1:]])
