from labs_common.compare.collect import *  # noqa: D100, F403
from labs_common.compare.plan import *  # noqa: F403
