"""Serve registered models for as long as the job lives.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/serve.py models.demo=models:/demo-stage2@candidate host=0.0.0.0

The words are those of `isthmus serve`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
