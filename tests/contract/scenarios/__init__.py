"""What users do with a client, written once and adapted to each release.

These modules run inside a client's own process (`contract.driver`); the tests only read the register.
"""
