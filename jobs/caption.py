"""Caption an image lake, exactly once; submitted again it resumes.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/caption.py model=models:/demo-stage2@candidate data=s3://bucket/lake out=s3://bucket/captions

The words are those of `isthmus caption`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])
