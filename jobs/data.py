"""Fetch, index, check or encode a data set.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/data.py index s3://bucket/lake

The words are those of `isthmus data`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
