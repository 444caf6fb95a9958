"""The linear layer of a mixture's experts: what is true of ATen only, of routings, and what is refused."""

import contracts


class TestExperts(contracts.Experts):
    places = contracts.ATEN[:1]
