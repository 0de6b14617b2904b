"""The egress policy proxy."""
