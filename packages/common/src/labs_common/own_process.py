from labs_common.compare.processes import *  # noqa: D100, F403
