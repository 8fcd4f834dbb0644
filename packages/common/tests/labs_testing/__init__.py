"""What the tests of all labs share: commands run in this process or in others, and promises that all must keep."""

import pytest

pytest.register_assert_rewrite("labs_testing.commands", "labs_testing.promises")
