"""A comparison of several runs: what is planned, runs in processes of their own, what they left, the report."""
