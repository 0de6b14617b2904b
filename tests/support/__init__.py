"""What several kinds of tests share: a server in a process of its own, published clients, and leak checks."""
