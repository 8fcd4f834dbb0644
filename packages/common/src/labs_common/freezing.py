from labs_common.frozen.audit import *  # noqa: D100, F403
