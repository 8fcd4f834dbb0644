from labs_common.frozen.cut import *  # noqa: D100, F403
