"""Run a pipeline; steps that are done are not run again.

    ray job submit --runtime-env infra/runtime_env.yaml -- \\
        python jobs/pipeline.py pipelines/demo.yaml out=/shared/demo data=/shared/demo-data

Results go to absolute paths that every node sees: what is relative lies in the job's own folder, which Ray deletes.

The words are those of `isthmus run`.
"""

import sys

from isthmus.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
