"""A head that runs lets another one go on with its service, and serves its open connections."""
