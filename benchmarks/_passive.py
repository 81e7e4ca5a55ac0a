"""Imported before torch: threads that wait for one another sleep instead of spinning.

On an idle machine that costs nothing to speak of. Where another process shares the cores, spinning threads hold the
very core that the thread they wait for needs, and a step takes up to ten times as long.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
