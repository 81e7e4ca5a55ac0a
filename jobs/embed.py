"""Embed images and texts in bulk, exactly once; submitted again it resumes.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/embed.py model=models:/demo-stage1@candidate data=s3://bucket/lake out=s3://bucket/vectors

The words are those of `isthmus embed`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
