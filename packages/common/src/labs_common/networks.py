from labs_common.saved import *  # noqa: D100, F403
