"""What the tests of all labs share: commands run in this process or in others, and promises that all must keep."""

import pytest

pytest.register_assert_rewrite("labs_common.testing.commands", "labs_common.testing.promises")
