from labs_common.frozen.cache import *  # noqa: D100, F403
