"""Train one recipe. The run's name is its identity: a job that is executed twice goes on, it does not start twice.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/train.py pipelines/demo/stage1.yaml storage=s3://bucket/runs

The words are those of `isthmus train`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
