"""Run a pipeline; steps that are done are not run again.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/pipeline.py pipelines/demo.yaml seed=1

The words are those of `isthmus run`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
