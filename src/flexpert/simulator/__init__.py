"""A service in virtual time: the code that decides is real, what computes is a cost model."""
